"""Tokens through DeepEP to the processes of their experts and back: values and gradients of one process.

A stand-in over gloo does what DeepEP's kernels do; tests/gpu/test_dispatch.py runs these where it is installed.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from automodel.kernels.experts import expert_mlp
from automodel.moe import deepep
from automodel.moe.deepep import DeepEPDispatcher, open_buffer
from ckpt_tools.core.errors import UsageError
from tests.automodel.kernels.quack_stand_in import installed_quack
from tests.automodel.moe.deepep_stand_in import Buffer
from tests.automodel.moe.test_dispatch import problem, reference
from tests.automodel.ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these with DeepEP itself")


def exchanged(num_experts: int, busy: int, tokens: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Output and gradients of this process, which has the first few of its tokens in `problem`."""
    rank = dist.get_rank()
    x, index, weight, gate_up, down = problem(num_experts, busy)
    buffer = Buffer(dist.group.WORLD)
    dispatcher = DeepEPDispatcher(buffer, dist.group.WORLD, num_experts)
    start = rank * dispatcher.chunk
    mine = slice(start, start + dispatcher.num_local_experts)
    own = slice(0, tokens[rank])
    leaves = [t.clone().requires_grad_() for t in (x[rank][own], weight[rank][own], gate_up[mine], down[mine])]
    rows, row_weight, counts, state = dispatcher.dispatch(leaves[0], index[rank][own], leaves[1])
    assert len(counts) == dispatcher.num_local_experts
    assert counts.sum() == len(rows) == len(row_weight)
    kernel = "torch" if dispatcher.num_local_experts else "grouped_mm"
    rows = expert_mlp(rows, counts, leaves[2], leaves[3], kernel)
    out = dispatcher.combine(rows * row_weight.unsqueeze(1), None, state)
    (out**2).sum().backward()
    assert buffer.calls == ["dispatch", "combine", "dispatch again", "combine"]
    return out.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize(
    ("num_experts", "busy", "tokens"),
    [(8, 8, (10,) * 4), (6, 6, (10,) * 4), (5, 5, (3, 10, 7, 1)), (3, 3, (10,) * 4), (8, 2, (10, 0, 10, 4))],
    ids=["8 over 4", "6 over 4", "5 over 4, uneven tokens", "3 over 4", "most experts idle, one without tokens"],
)
def test_values_and_gradients_are_those_of_one_process(num_experts: int, busy: int, tokens: tuple[int, ...]) -> None:
    out, x_grad, weight_grad, gate_up_grad, down_grad = reference(num_experts, busy, tokens)
    ranks = run_ranks(4, exchanged, num_experts, busy, tokens)
    of_tokens = [
        torch.cat([exact[rank][:count] for rank, count in enumerate(tokens)]) for exact in (out, x_grad, weight_grad)
    ]
    for exact, *parts in zip([*of_tokens, gate_up_grad, down_grad], *ranks, strict=True):
        # DeepEP carries weights in FP32.
        torch.testing.assert_close(torch.cat(parts), exact, rtol=1e-6, atol=1e-6 * exact.abs().max())


def test_weights_have_to_travel_with_their_tokens() -> None:
    dispatcher = DeepEPDispatcher.__new__(DeepEPDispatcher)
    with pytest.raises(UsageError, match="send their weights"):
        dispatcher.dispatch(torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UsageError, match="weight them there"):
        dispatcher.combine(torch.zeros(1, 8), torch.ones(1, 1), None)


@pytest.mark.parametrize(
    ("ranks", "said"), [(2, "DeepEP needs CUDA"), (3, "3 processes")], ids=["one without CUDA", "a size it has not"]
)
def test_what_keeps_one_process_from_it_is_said_on_all(ranks: int, said: str) -> None:
    def refused() -> str:
        deepep._obstacle = lambda *_: "DeepEP needs CUDA" if dist.get_rank() == 1 and ranks == 2 else None
        with pytest.raises(UsageError) as error:
            open_buffer(dist.group.WORLD, torch.device("cpu"), 64)
        return str(error.value)

    assert all(said in error for error in run_ranks(ranks, refused))


def test_a_group_has_one_buffer_until_longer_rows_need_a_larger_one() -> None:
    def sizes() -> list[int]:
        deepep._obstacle = lambda *_: None
        sys.modules["deep_ep"] = ModuleType("deep_ep")
        sys.modules["deep_ep"].Buffer = Buffer
        opened = [open_buffer(dist.group.WORLD, torch.device("cpu"), hidden) for hidden in (64, 32, 128)]
        assert opened[0] is opened[1] is not opened[2]
        return [buffer.num_nvl_bytes for buffer in opened]

    assert run_ranks(2, sizes) == [[512 * 128 * 2, 512 * 128 * 2, 512 * 256 * 2]] * 2


def test_models_train_through_it_and_with_either_kind_of_experts_as_with_collectives() -> None:
    pytest.importorskip("triton")

    def step(backend: dict[str, str]) -> tuple[float, list[Tensor], dict[str, str]]:
        from automodel import expert_backends
        from automodel.models.qwen3_moe import NeMoQwen3MoeForCausalLM
        from automodel.parallel import expert
        from automodel.parallel.fsdp import parallelize
        from automodel.parallel.mesh import MeshConfig
        from tests.automodel.tiny import batch, moe_config

        expert_backends.fused_obstacle = lambda *_: None
        expert_backends.sonic_obstacle = lambda *_, **__: None
        expert.open_buffer = lambda group, *_: Buffer(group)
        torch.manual_seed(0)
        model = NeMoQwen3MoeForCausalLM(moe_config(), {"layers": "eager", **backend}).train()
        parallelize(model, MeshConfig(dp_shard=1, ep=2).build())
        rows = batch(4)[2 * dist.get_rank() :][:2]
        with installed_quack():
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
        kernels = {row.layer: row.kernel for row in model.backend_report().rows}
        return loss.item(), [p.grad.full_tensor() for p in model.parameters()], kernels

    asked = [
        {"experts": "fused", "dispatch": "all_to_all"},
        {"experts": "fused", "dispatch": "deepep"},
        {"experts": "sonic", "dispatch": "all_to_all"},
        {"experts": "sonic", "dispatch": "deepep"},
    ]
    expected, *others = [run_ranks(2, step, backend) for backend in asked]
    for backend, ranks in zip(asked[1:], others, strict=True):
        for theirs, ours in zip(expected, ranks, strict=True):
            assert backend.items() <= ours[2].items()
            assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
            for collective, gradient in zip(theirs[1], ours[1], strict=True):
                torch.testing.assert_close(gradient, collective, rtol=1e-4, atol=1e-5)
