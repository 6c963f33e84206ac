"""The Triton kernels of a softmax router: the K largest logits of each row, their weights, and the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ELEMENTS = 2048
"""Logits of the rows that one program takes."""


@triton.jit
def _choose(
    logits,
    weights,
    indices,
    rows,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    E_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert, choice = tl.arange(0, E_BLOCK), tl.arange(0, K_BLOCK)
    here = (row < rows)[:, None] & (expert < E)[None, :]
    value = tl.load(logits + row.to(tl.int64)[:, None] * E + expert[None, :], mask=here, other=float("-inf"))
    value = value.to(tl.float32)
    # The largest, as torch has it; a difference of two of these is NaN again.
    value = tl.where(value == value, value, float("inf"))  # noqa: PLR0124
    # Rows past the end have no logits; 0 stands in for their largest, so that no difference is NaN.
    top = tl.where(row < rows, tl.max(value, axis=1), 0.0)
    free = (expert < E)[None, :] & (row >= 0)[:, None]
    share = tl.zeros([ROWS, K_BLOCK], tl.float32)
    index = tl.zeros([ROWS, K_BLOCK], tl.int32)
    for k in tl.range(K):
        best = tl.max(tl.where(free, value, float("-inf")), axis=1)
        # Of equals the first one; always some expert, also where all that are left are -inf.
        at = tl.min(tl.where(free & (value == best[:, None]), expert[None, :], E_BLOCK), axis=1)
        free = free & (expert[None, :] != at[:, None])
        share = tl.where((choice == k)[None, :], tl.exp(best - top)[:, None], share)
        index = tl.where((choice == k)[None, :], at[:, None], index)
    total = tl.sum(share, axis=1) if OVER_CHOSEN else tl.sum(tl.exp(value - top[:, None]), axis=1)
    total = tl.where(row < rows, total, 1.0)
    to = row.to(tl.int64)[:, None] * K + choice[None, :]
    inside = (row < rows)[:, None] & (choice < K)[None, :]
    tl.store(weights + to, (share / total[:, None]).to(weights.dtype.element_ty), mask=inside)
    tl.store(indices + to, index.to(tl.int64), mask=inside)


@triton.jit
def _choose_backward(
    grad,
    logits,
    indices,
    out,
    rows,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    E_BLOCK: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, E_BLOCK)
    there = row < rows
    here = there[:, None] & (expert < E)[None, :]
    own = row.to(tl.int64) * E
    value = tl.load(logits + own[:, None] + expert[None, :], mask=here, other=float("-inf")).to(tl.float32)
    # The gradient of each expert's weight; of those not chosen 0.
    given = tl.zeros([ROWS, E_BLOCK], tl.float32)
    chosen = tl.zeros([ROWS, E_BLOCK], tl.int1)
    for k in tl.range(K):
        at = tl.load(indices + row.to(tl.int64) * K + k, mask=there, other=0).to(tl.int32)
        incoming = tl.load(grad + row.to(tl.int64) * K + k, mask=there, other=0).to(tl.float32)
        is_here = expert[None, :] == at[:, None]
        given = tl.where(is_here, incoming[:, None], given)
        chosen = chosen | is_here
    top = tl.where(there, tl.max(value, axis=1), 0.0)
    share = tl.exp(value - top[:, None])
    if OVER_CHOSEN:
        share = tl.where(chosen, share, 0.0)
    share = share / tl.where(there, tl.sum(share, axis=1), 1.0)[:, None]
    mean = tl.sum(share * given, axis=1)
    gradient = share * (given - mean[:, None])
    tl.store(out + own[:, None] + expert[None, :], gradient.to(out.dtype.element_ty), mask=here)


def choose(
    logits: torch.Tensor, top_k: int, dtype: torch.dtype, *, over_chosen: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N, K] in `dtype` and int64 indices [N, K] of the K largest of each row, largest first.

    Weights are the softmax over the row in FP32, or over the chosen alone. Of equals the one of the lower index comes
    first, and NaN counts as the largest.

    Args:
        logits: [N, E], contiguous, of any floating dtype; E >= K.
    """
    rows, experts = logits.shape
    weights = logits.new_empty(rows, top_k, dtype=dtype)
    indices = logits.new_empty(rows, top_k, dtype=torch.int64)
    if rows:
        grid, at_once, block = _blocks(rows, experts)
        k_block = triton.next_power_of_2(top_k)
        _choose[grid](
            logits, weights, indices, rows, experts, top_k, at_once, block, k_block, over_chosen, num_warps=4
        )  # fmt: skip
    return weights, indices


def choose_backward(
    grad: torch.Tensor, logits: torch.Tensor, indices: torch.Tensor, *, over_chosen: bool
) -> torch.Tensor:
    """The gradient of `logits` [N, E], in their dtype, from that of the weights [N, K]; all contiguous."""
    rows, experts = logits.shape
    out = torch.empty_like(logits)
    if rows:
        grid, at_once, block = _blocks(rows, experts)
        _choose_backward[grid](
            grad, logits, indices, out, rows, experts, indices.shape[1], at_once, block, over_chosen, num_warps=4
        )  # fmt: skip
    return out


def _blocks(rows: int, experts: int) -> tuple[tuple[int], int, int]:
    """The grid, rows of one program, and a power of two that has all experts."""
    block = triton.next_power_of_2(experts)
    at_once = max(1, _ELEMENTS // block)
    return (triton.cdiv(rows, at_once),), at_once, block
