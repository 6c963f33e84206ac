"""The Triton kernels of DeepSeek V3's router (arXiv 2412.19437, section 2.1.2): the choice of experts by sigmoid scores
within the best groups, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ELEMENTS = 2048
"""Logits of the rows that one program takes."""

_NEAR_ZERO = tl.constexpr(1e-20)


@triton.jit
def _kept_groups(corrected, place, group, G: tl.constexpr, TOP_G: tl.constexpr, P_BLOCK: tl.constexpr):
    """Which groups [ROWS, G_BLOCK] have the largest sums of two scores; corrected is [ROWS, G_BLOCK, P_BLOCK]."""
    best = tl.max(corrected, axis=2)
    at = tl.min(tl.where(corrected == best[:, :, None], place, P_BLOCK), axis=2)
    quality = best + tl.max(tl.where(place == at[:, :, None], float("-inf"), corrected), axis=2)
    kept = quality != quality  # none  # noqa: PLR0124
    for _ in tl.range(TOP_G):
        free = (group < G) & (kept == 0)
        most = tl.max(tl.where(free, quality, float("-inf")), axis=1)
        which = tl.min(tl.where(free & (quality == most[:, None]), group, G), axis=1)
        kept = kept | (group == which[:, None])
    return kept


@triton.jit
def _choose(
    logits,
    bias,
    weights,
    indices,
    rows,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    TOP_G: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    G_BLOCK: tl.constexpr,
    P_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    size: tl.constexpr = E // G
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group, place = tl.arange(0, G_BLOCK)[None, :], tl.arange(0, P_BLOCK)[None, None, :]
    real = (group < G)[:, :, None] & (place < size)
    expert = group[:, :, None] * size + place
    here = (row < rows)[:, None, None] & real
    score = tl.sigmoid(tl.load(logits + row.to(tl.int64)[:, None, None] * E + expert, mask=here, other=0.0))
    corrected = score + tl.load(bias + expert, mask=real, other=0.0)
    # NaN is the largest, as torch has it.
    corrected = tl.where(corrected == corrected, corrected, float("inf"))  # noqa: PLR0124
    corrected = tl.where(real, corrected, float("-inf"))
    if TOP_G < G:
        kept = _kept_groups(corrected, place, group, G, TOP_G, P_BLOCK)
        corrected = tl.where(kept[:, :, None], corrected, float("-inf"))

    shape: tl.constexpr = [ROWS, G_BLOCK * P_BLOCK]
    value, score = tl.reshape(corrected, shape), tl.reshape(score, shape)
    expert = tl.reshape(tl.broadcast_to(expert, [ROWS, G_BLOCK, P_BLOCK]), shape)
    free = tl.reshape(tl.broadcast_to(real, [ROWS, G_BLOCK, P_BLOCK]), shape)
    choice = tl.arange(0, K_BLOCK)
    share = tl.zeros([ROWS, K_BLOCK], tl.float32)
    index = tl.zeros([ROWS, K_BLOCK], tl.int32)
    for k in tl.range(K):
        best = tl.max(tl.where(free, value, float("-inf")), axis=1)
        # Of equals the first one.
        at = tl.min(tl.where(free & (value == best[:, None]), expert, E), axis=1)
        is_best = expert == at[:, None]
        own = tl.sum(tl.where(is_best & free, score, 0.0), axis=1)
        free = free & (is_best == 0)
        share = tl.where((choice == k)[None, :], own[:, None], share)
        index = tl.where((choice == k)[None, :], at[:, None], index)
    if NORMALIZE:
        share = share / (tl.sum(share, axis=1) + _NEAR_ZERO)[:, None]
    to = row.to(tl.int64)[:, None] * K + choice[None, :]
    inside = (row < rows)[:, None] & (choice < K)[None, :]
    tl.store(weights + to, share * scale, mask=inside)
    tl.store(indices + to, index.to(tl.int64), mask=inside)


@triton.jit
def _choose_backward(
    grad,
    logits,
    indices,
    out,
    rows,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    E_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = row.to(tl.int64)[:, None]
    choice, expert = tl.arange(0, K_BLOCK)[None, :], tl.arange(0, E_BLOCK)[None, :]
    there = row < rows
    inside = there[:, None] & (choice < K)
    at = tl.load(indices + own * K + choice, mask=inside, other=0).to(tl.int32)
    score = tl.sigmoid(tl.load(logits + own * E + at, mask=inside, other=0.0))
    slope = tl.load(grad + own * K + choice, mask=inside, other=0.0) * scale
    if NORMALIZE:
        # The scores past the last choice are no scores.
        total = tl.sum(tl.where(inside, score, 0.0), axis=1)[:, None] + _NEAR_ZERO
        slope = (slope - tl.sum(slope * score, axis=1)[:, None] / total) / total
    slope = slope * score * (1 - score)
    gradient = tl.zeros([ROWS, E_BLOCK], tl.float32)
    for k in tl.range(K):
        which = tl.sum(tl.where(choice == k, at, 0), axis=1)[:, None]
        incoming = tl.sum(tl.where(choice == k, slope, 0.0), axis=1)[:, None]
        gradient = tl.where(expert == which, incoming, gradient)
    tl.store(out + own * E + expert, gradient, mask=there[:, None] & (expert < E))


def choose_in_groups(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    *,
    groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing weights in FP32 and int64 indices, both [N, K], of the K largest corrected scores, largest first.

    Of equals the one of the lower index comes first, and NaN counts as the largest.

    Args:
        logits: FP32 [N, E], contiguous.
        bias: FP32 [E], what corrects the scores.
        groups: a divisor of E; groups have two experts or more where not all of them are kept.
    """
    rows, experts = logits.shape
    weights = logits.new_empty(rows, top_k)
    indices = logits.new_empty(rows, top_k, dtype=torch.int64)
    if rows:
        g_block, p_block = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
        at_once = max(1, _ELEMENTS // (g_block * p_block))
        _choose[(triton.cdiv(rows, at_once),)](
            logits, bias, weights, indices, rows, scale, experts, top_k, groups, top_groups, normalize,
            at_once, g_block, p_block, triton.next_power_of_2(top_k), num_warps=4,
        )  # fmt: skip
    return weights, indices


def choose_in_groups_backward(
    grad: torch.Tensor, logits: torch.Tensor, indices: torch.Tensor, *, normalize: bool, scale: float
) -> torch.Tensor:
    """The gradient of `logits` [N, E] from that of the weights [N, K]; all FP32 and contiguous."""
    rows, experts = logits.shape
    out = torch.empty_like(logits)
    if rows:
        block = triton.next_power_of_2(experts)
        at_once = max(1, _ELEMENTS // block)
        top_k = indices.shape[1]
        _choose_backward[(triton.cdiv(rows, at_once),)](
            grad, logits, indices, out, rows, scale, experts, top_k, normalize, at_once, block,
            triton.next_power_of_2(top_k), num_warps=4,
        )  # fmt: skip
    return out
