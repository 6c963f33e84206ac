"""The Triton kernels between a fused projection and the attention: norms of query and key heads, and their rotation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_UNITS = 2
"""Groups of heads that a program of the forward pass has."""
_PROGRAMS = 1056
"""Of the backward pass, each with a part of the gradients of the weights: eight for each multiprocessor of an H200."""


class Tables(NamedTuple):
    """Rotary tables [B or 1, S, d], the last dimension contiguous, both of the same strides."""

    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def strides(self) -> tuple[int, int]:
        """Over rows, 0 where they share one, and over tokens."""
        return (self.cos.stride(0) if len(self.cos) > 1 else 0), self.cos.stride(1)


@triton.jit
def _halves(pointer, at, inside, HALF: tl.constexpr):
    """The two halves of heads, or of rows of a table."""
    low = tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)
    return low, tl.load(pointer + at + HALF, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(pointer, at, low, high, inside, HALF: tl.constexpr):
    tl.store(pointer + at, low.to(pointer.dtype.element_ty), mask=inside)
    tl.store(pointer + at + HALF, high.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _inverse_norm(low, high, eps, HALF: tl.constexpr):
    """Of heads along the last dimension, which is kept."""
    return tl.rsqrt(tl.sum(low * low + high * high, axis=-1, keep_dims=True) / (2 * HALF) + eps)


@triton.jit
def _turned(low, high, weight, column, cos_low, cos_high, sin_low, sin_high, eps, offset, HALF: tl.constexpr):
    """Heads, normed and rotated."""
    scale = _inverse_norm(low, high, eps, HALF)
    weight_low, weight_high = _halves(weight, column, column < HALF, HALF)
    low, high = low * scale * (weight_low + offset), high * scale * (weight_high + offset)
    return low * cos_low - high * sin_low, high * cos_high + low * sin_high


@triton.jit
def _turned_back(
    grad_low, grad_high, low, high, weight_low, weight_high, cos_low, cos_high, sin_low, sin_high, eps,
    HALF: tl.constexpr,
):  # fmt: skip
    """The gradients of heads before `_turned`, and what they add to those of its weight."""
    grad_low, grad_high = grad_low * cos_low + grad_high * sin_high, grad_high * cos_high - grad_low * sin_low
    scale = _inverse_norm(low, high, eps, HALF)
    low, high = low * scale, high * scale
    by_low, by_high = grad_low * low, grad_high * high
    mean = tl.sum(by_low * weight_low + by_high * weight_high, axis=-1, keep_dims=True) / (2 * HALF)
    return (
        scale * (grad_low * weight_low - low * mean),
        scale * (grad_high * weight_high - high * mean),
        by_low,
        by_high,
    )


@triton.jit
def _norm_and_rotate(
    qkv, q_weight, k_weight, cos, sin, to_query, to_key, to_value, units, S, table_b, table_s, eps, offset,
    G: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    # A unit is a group of heads of a token: R queries, a key, a value.
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)
    token, there = unit // G, (unit < units)[:, None]
    angle = (token // S * table_b + token % S * table_s)[:, None] + column
    cos_low, cos_high = _halves(cos, angle, there, HALF)
    sin_low, sin_high = _halves(sin, angle, there, HALF)

    at = unit[:, None, None] * (R + 2) * 2 * HALF + row * 2 * HALF + column
    here = there[:, :, None] & (row < R)
    low, high = _halves(qkv, at, here, HALF)
    low, high = _turned(
        low, high, q_weight, column, cos_low[:, None, :], cos_high[:, None, :], sin_low[:, None, :],
        sin_high[:, None, :], eps, offset, HALF,
    )  # fmt: skip
    _store_halves(to_query, unit[:, None, None] * R * 2 * HALF + row * 2 * HALF + column, low, high, here, HALF)

    at = (unit * (R + 2) + R)[:, None] * 2 * HALF + column
    low, high = _halves(qkv, at, there, HALF)
    low, high = _turned(low, high, k_weight, column, cos_low, cos_high, sin_low, sin_high, eps, offset, HALF)
    to = unit[:, None] * 2 * HALF + column
    _store_halves(to_key, to, low, high, there, HALF)
    low, high = _halves(qkv, at + 2 * HALF, there, HALF)
    _store_halves(to_value, to, low, high, there, HALF)


@triton.jit
def _norm_and_rotate_backward(
    grad_query, grad_key, grad_value, qkv, q_weight, k_weight, cos, sin, grad_qkv, grad_weights,
    units, S, table_b, table_s, eps, offset,
    G: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)
    here, always = row < R, column < HALF
    q_low, q_high = _halves(q_weight, column, always, HALF)
    k_low, k_high = _halves(k_weight, column, always, HALF)
    total_q_low, total_q_high = tl.zeros([ROWS, HALF], tl.float32), tl.zeros([ROWS, HALF], tl.float32)
    total_k_low, total_k_high = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
    unit = tl.program_id(0).to(tl.int64)
    while unit < units:
        token = unit // G
        angle = token // S * table_b + token % S * table_s + column
        cos_low, cos_high = _halves(cos, angle, always, HALF)
        sin_low, sin_high = _halves(sin, angle, always, HALF)
        at, once = unit * (R + 2) * 2 * HALF + column, unit * 2 * HALF + column
        # All loads come before what waits for the first of them.
        query_low, query_high = _halves(grad_query, unit * R * 2 * HALF + row * 2 * HALF + column, here, HALF)
        low, high = _halves(qkv, at + row * 2 * HALF, here, HALF)
        key_low, key_high = _halves(grad_key, once, always, HALF)
        own_low, own_high = _halves(qkv, at + R * 2 * HALF, always, HALF)
        value_low, value_high = _halves(grad_value, once, always, HALF)

        low, high, by_low, by_high = _turned_back(
            query_low, query_high, low, high, q_low + offset, q_high + offset, cos_low, cos_high, sin_low, sin_high,
            eps, HALF,
        )  # fmt: skip
        total_q_low += by_low
        total_q_high += by_high
        _store_halves(grad_qkv, at + row * 2 * HALF, low, high, here, HALF)
        low, high, by_low, by_high = _turned_back(
            key_low, key_high, own_low, own_high, k_low + offset, k_high + offset, cos_low, cos_high, sin_low, sin_high,
            eps, HALF,
        )  # fmt: skip
        total_k_low += by_low
        total_k_high += by_high
        _store_halves(grad_qkv, at + R * 2 * HALF, low, high, always, HALF)
        _store_halves(grad_qkv, at + (R + 1) * 2 * HALF, value_low, value_high, always, HALF)
        unit += tl.num_programs(0)
    own = tl.program_id(0) * 4 * HALF + column
    _store_halves(grad_weights, own, tl.sum(total_q_low, axis=0), tl.sum(total_q_high, axis=0), always, HALF)
    _store_halves(grad_weights, own + 2 * HALF, total_k_low, total_k_high, always, HALF)


def norm_and_rotate(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, tables: Tables, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, S, G * R, d], normed and rotated, keys [B, S, G, d] likewise, and values [B, S, G, d] as they are.

    Args:
        qkv: [B, S, G, R + 2, d], contiguous: of each group its queries, its key and its value; d is a power of two.
        q_weight, k_weight: [d], of the norms, to which `offset` is added.
    """
    batch, length, groups, heads, size = qkv.shape
    query = qkv.new_empty(batch, length, groups * (heads - 2), size)
    key, value = (qkv.new_empty(batch, length, groups, size) for _ in range(2))
    if units := batch * length * groups:
        rows = triton.next_power_of_2(heads - 2)
        _norm_and_rotate[(triton.cdiv(units, _UNITS),)](
            qkv, q_weight, k_weight, *tables, query, key, value, units, length, *tables.strides, eps, offset,
            groups, heads - 2, size // 2, rows, _UNITS, num_warps=_warps(_UNITS * rows * size, 64),
        )  # fmt: skip
    return query, key, value


def norm_and_rotate_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    tables: Tables,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `qkv` and of the two weights, from contiguous ones of the three results."""
    batch, length, groups, heads, size = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    units = batch * length * groups
    programs = min(units, _PROGRAMS)
    parts = qkv.new_empty(programs, 2, size, dtype=torch.float32)
    if programs:
        rows = triton.next_power_of_2(heads - 2)
        _norm_and_rotate_backward[(programs,)](
            *grads, qkv, q_weight, k_weight, *tables, grad_qkv, parts,
            units, length, *tables.strides, eps, offset,
            groups, heads - 2, size // 2, rows, num_warps=_warps(rows * size, 8),
        )  # fmt: skip
    of_query, of_key = parts.sum(0)
    return grad_qkv, of_query.to(q_weight.dtype, copy=True), of_key.to(k_weight.dtype, copy=True)


def _warps(values: int, each: int) -> int:
    """Warps whose threads have `each` of the values of the queries, at most 16."""
    return max(1, min(16, values // (32 * each)))
