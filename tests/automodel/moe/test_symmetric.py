"""Experts over processes that read each other's memory: values and gradients of one process, in any division.

Without GPUs Triton's interpreter runs the kernels, in FP32, and files that all processes map stand in for the memory.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from automodel.kernels.activations import SWIGLU, ClampedSwiGLU, GatedActivation
from automodel.kernels.experts import expert_mlp
from automodel.kernels.permute import combine_rows, rows_by_expert, sort_by_expert
from automodel.kernels.triton_rows import activation_form
from automodel.moe import symmetric
from automodel.moe.peers import Peers
from automodel.moe.symmetric import ExpertsOfPeers, experts_of_peers
from tests.automodel.kernels.quack_stand_in import installed_quack
from tests.automodel.moe.file_peers import FilePeers
from tests.automodel.ranks import run_ranks

HIDDEN, WIDTH, CHOICES = 16, 8, 2
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these with real memory")


@dataclass(frozen=True)
class Problem:
    """Tokens of each process, and experts of which only the first `busy` are ever chosen."""

    tokens: tuple[int, ...]
    experts: int
    busy: int
    biased: bool = False
    layers: int = 1
    seed: int = 0

    @property
    def activation(self) -> GatedActivation:
        return ClampedSwiGLU(1.702, 0.7) if self.biased else SWIGLU

    def inputs(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(tokens, experts' indices, routing weights) of each process."""
        generator = torch.Generator().manual_seed(self.seed)
        made = []
        for count in self.tokens:
            x = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
            index = torch.rand(count, self.busy, generator=generator).argsort(-1)[:, :CHOICES]
            weight = torch.rand(count, CHOICES, generator=generator, dtype=torch.float64)
            made.append((x.to(dtype), index, weight.to(dtype)))
        return made

    def parameters(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """Of each layer: the two projections, and their biases if there are any."""
        generator = torch.Generator().manual_seed(1)
        shapes = [(self.experts, 2 * WIDTH, HIDDEN), (self.experts, HIDDEN, WIDTH)]
        shapes += [(self.experts, 2 * WIDTH), (self.experts, HIDDEN)] if self.biased else []
        return [
            [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / 2 for shape in shapes]
            for _ in range(self.layers)
        ]


def reference(problem: Problem) -> list[Tensor]:
    """Outputs and gradients of inputs (joined over processes) and parameters, on one process, in FP64."""
    inputs = problem.inputs(torch.float64)
    x, index, weight = (torch.cat(parts) for parts in zip(*inputs, strict=True))
    layers = problem.parameters(torch.float64)
    leaves = [x, weight, *(parameter for layer in layers for parameter in layer)]
    for leaf in leaves:
        leaf.requires_grad_()
    for gate_up, down, *biases in layers:
        order = sort_by_expert(index, problem.experts)
        named = dict(zip(("gate_up_bias_E2F", "down_bias_ED"), biases, strict=False))
        rows = rows_by_expert(x, order)
        rows = expert_mlp(rows, order.counts_E, gate_up, down, "torch", problem.activation, **named)
        x = x + combine_rows(rows, weight, order)
    (x**2).sum().backward()
    return [x.detach(), *(leaf.grad for leaf in leaves)]


def run_layers(
    problem: Problem, peers: Peers, x: Tensor, index: Tensor, weight: Tensor, layers: list[list[Tensor]], again: bool
) -> Tensor:
    """All layers of `problem` with residuals; `again` runs each a second time in the backward pass."""
    chunk = -(-problem.experts // peers.size)
    for parameters in layers:
        division = ExpertsOfPeers(peers, chunk, len(parameters[0]), activation_form(problem.activation))

        def run(tokens: Tensor, division=division, parameters=parameters) -> Tensor:
            return experts_of_peers(tokens, index, weight, division, *parameters)

        x = x + (checkpoint(run, x, use_reentrant=False) if again else run(x))
    return x


def divided(problem: Problem, directory: str, again: bool, quack: bool) -> list[Tensor]:
    """This process's part of what `reference` computes; gradients of parameters as they come."""
    if quack:
        symmetric.products_obstacle = lambda *_: None
    peers = FilePeers(directory)
    x, index, weight = problem.inputs(torch.float32)[peers.rank]
    chunk = -(-problem.experts // peers.size)
    mine = slice(peers.rank * chunk, (peers.rank + 1) * chunk)
    layers = [[p[mine].clone() for p in layer] for layer in problem.parameters(torch.float32)]
    leaves = [x, weight, *(parameter for layer in layers for parameter in layer)]
    for leaf in leaves:
        leaf.requires_grad_()
    with installed_quack() if quack else nullcontext():
        out = run_layers(problem, peers, x, index, weight, layers, again)
        (out**2).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(problem: Problem, again: bool = False, quack: bool = False) -> None:
    processes = len(problem.tokens)
    with tempfile.TemporaryDirectory() as directory:
        ranks = run_ranks(processes, divided, problem, directory, again, quack)
    for number, (exact, *parts) in enumerate(zip(reference(problem), *ranks, strict=True)):
        # Gradients of the experts are means over the processes.
        scale = processes if number > 2 else 1
        torch.testing.assert_close(torch.cat(parts).double() * scale, exact, rtol=2e-5, atol=2e-5 * exact.abs().max())


@pytest.mark.parametrize(
    "problem",
    [
        Problem((7, 7), experts=8, busy=8),
        Problem((5, 9), experts=5, busy=5, biased=True),
        Problem((6, 0), experts=6, busy=6),
        Problem((4, 3), experts=8, busy=2),
        Problem((3, 8, 0, 5), experts=6, busy=5),
        Problem((2, 2, 2, 2), experts=3, busy=3, biased=True),
    ],
    ids=["even", "uneven, biases", "no tokens on one", "one idle", "six over four", "three over four"],
)
@pytest.mark.parametrize("quack", [False, True], ids=["torch", "QuACK's products"])
def test_values_and_all_gradients_are_those_of_one_process(problem: Problem, quack: bool) -> None:
    assert_same(problem, quack=quack)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_layers_share_buffers_forward_backward_and_when_run_again(again: bool) -> None:
    assert_same(Problem((6, 4), experts=7, busy=7, layers=3), again)


def test_buffers_grow_for_the_process_with_most_tokens_and_serve_fewer() -> None:
    problems = [Problem(tokens, experts=4, busy=4) for tokens in ((3, 2), (2, 7), (5, 5), (0, 0), (1, 0))]

    def one_after_another(directory: str) -> tuple[list[Tensor], int]:
        peers = FilePeers(directory)
        mine = slice(2 * peers.rank, 2 * peers.rank + 2)
        outs = []
        for problem in problems:
            parameters = [p[mine] for p in problem.parameters(torch.float32)[0]]
            outs.append(run_layers(problem, peers, *problem.inputs(torch.float32)[peers.rank], [parameters], False))
        return outs, peers.made

    with tempfile.TemporaryDirectory() as directory:
        ranks = run_ranks(2, one_after_another, directory)
    for outs in zip(problems, *(outs for outs, _ in ranks), strict=True):
        exact = reference(outs[0])[0]
        torch.testing.assert_close(torch.cat(outs[1:]).double(), exact, rtol=2e-5, atol=1e-5)
    assert [made for _, made in ranks] == [4, 4]


def test_half_precision_is_rounded_once_a_process() -> None:
    def halves(directory: str) -> Tensor:
        peers = FilePeers(directory)
        x, index, weight = Problem((6, 6), experts=4, busy=4).inputs(torch.float16)[peers.rank]
        parameters = [p[2 * peers.rank :][:2] for p in Problem((), 4, 4).parameters(torch.float16)[0]]
        division = ExpertsOfPeers(peers, 2, 2, activation_form(SWIGLU))
        return experts_of_peers(x, index, weight, division, *parameters)

    with tempfile.TemporaryDirectory() as directory:
        out = torch.cat(run_ranks(2, halves, directory))
    problem = Problem((6, 6), experts=4, busy=4)
    exact = reference(problem)[0] - torch.cat([x for x, _, _ in problem.inputs(torch.float64)])
    assert out.dtype == torch.float16
    assert (out.double() - exact).norm() < 2e-3 * exact.norm()


def test_a_model_chooses_its_peers_memory_and_trains_as_with_collectives() -> None:
    def step(directory: str, dispatch: str) -> tuple[float, list[Tensor], str]:
        from automodel import expert_backends
        from automodel.models import layer
        from automodel.models.qwen3_moe import NeMoQwen3MoeForCausalLM
        from automodel.parallel import expert
        from automodel.parallel.fsdp import parallelize
        from automodel.parallel.mesh import MeshConfig
        from tests.automodel.tiny import batch, moe_config

        expert_backends.fused_obstacle = lambda *_: None
        expert.open_peers = lambda *_: FilePeers(directory)
        layer._compiled = lambda kind: torch.compile(kind._run, backend="eager")
        torch.manual_seed(0)
        model = NeMoQwen3MoeForCausalLM(moe_config(), {"dispatch": dispatch, "layers": "compiled"}).train()
        parallelize(model, MeshConfig(dp_shard=1, ep=2).build())
        rows = batch(4)[2 * torch.distributed.get_rank() :][:2]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        kernels = {row.layer: row.kernel for row in model.backend_report().rows}
        return loss.item(), [p.grad.full_tensor() for p in model.parameters()], kernels["dispatch"]

    results = []
    for dispatch in ("all_to_all", "auto"):
        with tempfile.TemporaryDirectory() as directory:
            results.append(run_ranks(2, step, directory, dispatch))
    for collective, shared in zip(*results, strict=True):
        assert (collective[2], shared[2]) == ("all_to_all", "symmetric")
        assert shared[0] == pytest.approx(collective[0], rel=1e-5)
        for theirs, ours in zip(collective[1], shared[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
