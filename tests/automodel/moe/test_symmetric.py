"""Experts over processes that read each other's memory: values and gradients of one process, in any division.

Without GPUs Triton's interpreter runs the kernels, in FP32, and files that all processes map stand in for the memory.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from automodel.kernels.activations import SWIGLU, ClampedSwiGLU, GatedActivation
from automodel.kernels.experts import expert_mlp
from automodel.kernels.permute import combine_rows, rows_by_expert, sort_by_expert
from automodel.kernels.triton_rows import activation_form
from automodel.moe.peers import Mailbox, Peers
from automodel.moe.symmetric import ExpertsOfPeers, experts_of_peers
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


def divided(problem: Problem, directory: str, again: bool) -> list[Tensor]:
    """This process's part of what `reference` computes; gradients of parameters as they come."""
    peers = FilePeers(directory)
    x, index, weight = problem.inputs(torch.float32)[peers.rank]
    chunk = -(-problem.experts // peers.size)
    mine = slice(peers.rank * chunk, (peers.rank + 1) * chunk)
    layers = [[p[mine].clone() for p in layer] for layer in problem.parameters(torch.float32)]
    leaves = [x, weight, *(parameter for layer in layers for parameter in layer)]
    for leaf in leaves:
        leaf.requires_grad_()
    out = run_layers(problem, peers, x, index, weight, layers, again)
    (out**2).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(problem: Problem, again: bool = False) -> None:
    processes = len(problem.tokens)
    with tempfile.TemporaryDirectory() as directory:
        ranks = run_ranks(processes, divided, problem, directory, again)
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
def test_values_and_all_gradients_are_those_of_one_process(problem: Problem) -> None:
    assert_same(problem)
