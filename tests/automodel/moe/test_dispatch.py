"""Tokens reach the processes of their experts and come back, with the values and gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from automodel.kernels.experts import expert_mlp
from automodel.moe.dispatch import AllToAllDispatcher
from tests.automodel.ranks import run_ranks

HIDDEN, WIDTH, TOKENS, CHOICES = 8, 4, 10, 2


def problem(num_experts: int, busy: int) -> tuple[Tensor, ...]:
    """Tokens of 4 processes; only the first `busy` experts are ever chosen."""
    generator = torch.Generator().manual_seed(0)
    real = {"generator": generator, "dtype": torch.float64}
    x = torch.randn(4, TOKENS, HIDDEN, **real)
    index = torch.rand(4, TOKENS, busy, generator=generator).argsort(-1)[..., :CHOICES]
    weight = torch.rand(4, TOKENS, CHOICES, **real)
    gate_up = torch.randn(num_experts, 2 * WIDTH, HIDDEN, **real)
    down = torch.randn(num_experts, HIDDEN, WIDTH, **real)
    return x, index, weight, gate_up, down


def reference(num_experts: int, busy: int, tokens: tuple[int, ...] = (TOKENS,) * 4) -> tuple[Tensor, ...]:
    """The same by definition, token by token, on one process; of each process's tokens only the first few count."""
    x, index, weight, gate_up, down = (t.clone() for t in problem(num_experts, busy))
    leaves = [t.requires_grad_() for t in (x, weight, gate_up, down)]
    hidden = torch.einsum("rnd,rnkfd->rnkf", x, gate_up[index])
    gate, up = hidden.chunk(2, -1)
    rows = torch.einsum("rnkf,rnkdf->rnkd", torch.nn.functional.silu(gate) * up, down[index])
    out = (rows * weight[..., None]).sum(2)
    sum((out[rank, :count] ** 2).sum() for rank, count in enumerate(tokens)).backward()
    return out.detach(), *(leaf.grad for leaf in leaves)


def exchanged(num_experts: int, busy: int, weights_travel: bool) -> tuple[Tensor, ...]:
    rank = dist.get_rank()
    x, index, weight, gate_up, down = problem(num_experts, busy)
    dispatcher = AllToAllDispatcher(dist.group.WORLD, num_experts)
    start = rank * dispatcher.chunk
    mine = slice(start, start + dispatcher.num_local_experts)
    leaves = [t.clone().requires_grad_() for t in (x[rank], weight[rank], gate_up[mine], down[mine])]
    sent_weight = leaves[1] if weights_travel else None
    rows, row_weight, counts, state = dispatcher.dispatch(leaves[0], index[rank], sent_weight)
    assert len(counts) == dispatcher.num_local_experts
    assert counts.sum() == len(rows)
    kernel = "torch" if dispatcher.num_local_experts else "grouped_mm"
    rows = expert_mlp(rows, counts, leaves[2], leaves[3], kernel)
    if weights_travel:
        out = dispatcher.combine(rows * row_weight.unsqueeze(1), None, state)
    else:
        out = dispatcher.combine(rows, leaves[1], state)
    (out**2).sum().backward()
    return out.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize(
    ("num_experts", "busy"),
    [(8, 8), (6, 6), (5, 5), (3, 3), (8, 2)],
    ids=["8 over 4", "6 over 4", "5 over 4", "3 over 4", "most experts idle"],
)
@pytest.mark.parametrize("weights_travel", [False, True], ids=["weighted at home", "weights travel"])
def test_values_and_gradients_are_those_of_one_process(num_experts, busy, weights_travel):
    out, x_grad, weight_grad, gate_up_grad, down_grad = reference(num_experts, busy)
    ranks = run_ranks(4, exchanged, num_experts, busy, weights_travel)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for rank, result in enumerate(ranks):
        torch.testing.assert_close(result[0], out[rank], **close)
        torch.testing.assert_close(result[1], x_grad[rank], **close)
        torch.testing.assert_close(result[2], weight_grad[rank], **close)
    torch.testing.assert_close(torch.cat([r[3] for r in ranks]), gate_up_grad, **close)
    torch.testing.assert_close(torch.cat([r[4] for r in ranks]), down_grad, **close)


@pytest.mark.parametrize(("num_experts", "held"), [(6, [2, 2, 2, 0]), (5, [2, 2, 1, 0]), (8, [2, 2, 2, 2])])
def test_experts_are_divided_as_dtensor_divides_them(num_experts, held):
    def local():
        dispatcher = AllToAllDispatcher(dist.group.WORLD, num_experts)
        chunks = torch.arange(num_experts).chunk(dispatcher.size)
        rank = dist.get_rank()
        return dispatcher.num_local_experts, len(chunks[rank]) if rank < len(chunks) else 0

    assert run_ranks(4, local) == [(count, count) for count in held]


def test_gradients_are_to_be_scaled_to_a_mean_over_the_group():
    assert run_ranks(2, lambda: AllToAllDispatcher(dist.group.WORLD, 4).gradient_scale) == [0.5, 0.5]


def test_bfloat16_rows_travel_unchanged():
    def same():
        x = torch.randn(6, HIDDEN).to(torch.bfloat16)
        index = torch.arange(6).remainder(4).unsqueeze(1)
        dispatcher = AllToAllDispatcher(dist.group.WORLD, 4)
        rows, _, _, state = dispatcher.dispatch(x, index)
        return torch.equal(dispatcher.combine(rows, torch.ones(6, 1, dtype=torch.bfloat16), state), x)

    assert all(run_ranks(2, same))
