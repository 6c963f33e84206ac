"""The Triton kernels between a fused projection and the attention: norms of query and key heads, and their rotation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_PROGRAMS = 2048
"""Of the backward pass, each with a part of the gradients of the weights: more than run at once on the largest GPUs."""


class Tables(NamedTuple):
    """Rotary tables [B or 1, S, d], the last dimension contiguous, both of the same strides."""

    cos: torch.Tensor
    sin: torch.Tensor

    @property
    def strides(self) -> tuple[int, int]:
        """Over rows, 0 where they share one, and over tokens."""
        return (self.cos.stride(0) if len(self.cos) > 1 else 0), self.cos.stride(1)


@triton.jit
def _weights(q_weight, k_weight, column, key, offset):
    """The weight of each row's norm; of values any."""
    of_query, of_key = tl.load(q_weight + column).to(tl.float32), tl.load(k_weight + column).to(tl.float32)
    return tl.where(key, of_key[None, :], of_query[None, :]) + offset


@triton.jit
def _angles(table, at, HALF: tl.constexpr):
    """The two halves of one token's row of a table."""
    low, high = tl.load(table + at).to(tl.float32), tl.load(table + at + HALF).to(tl.float32)
    return low[None, :], high[None, :]


@triton.jit
def _scale(low, high, eps, HALF: tl.constexpr):
    return tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF) + eps)[:, None]


@triton.jit
def _norm_and_rotate(
    qkv, q_weight, k_weight, cos, sin, to_query, to_key, to_value, S, table_b, table_s, eps, offset,
    G: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # A group of heads of a token: R queries, a key, a value.
    unit = tl.program_id(0).to(tl.int64)
    token = unit // G
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)
    query, key, value = row < R, row == R, row == R + 1
    at = unit * (R + 2) * 2 * HALF + row * 2 * HALF + column[None, :]
    here = row < R + 2
    x_low = tl.load(qkv + at, mask=here, other=0.0).to(tl.float32)
    x_high = tl.load(qkv + at + HALF, mask=here, other=0.0).to(tl.float32)
    scale = _scale(x_low, x_high, eps, HALF)
    low = x_low * scale * _weights(q_weight, k_weight, column, key, offset)
    high = x_high * scale * _weights(q_weight, k_weight, column + HALF, key, offset)
    angle = token // S * table_b + token % S * table_s + column
    cos_low, cos_high = _angles(cos, angle, HALF)
    sin_low, sin_high = _angles(sin, angle, HALF)
    turned_low, turned_high = low * cos_low - high * sin_low, high * cos_high + low * sin_high
    dtype = to_query.dtype.element_ty
    of_query = to_query + unit * R * 2 * HALF + row * 2 * HALF + column[None, :]
    tl.store(of_query, turned_low.to(dtype), mask=query)
    tl.store(of_query + HALF, turned_high.to(dtype), mask=query)
    once = unit * 2 * HALF + row * 0 + column[None, :]
    tl.store(to_key + once, turned_low.to(dtype), mask=key)
    tl.store(to_key + once + HALF, turned_high.to(dtype), mask=key)
    tl.store(to_value + once, x_low.to(dtype), mask=value)
    tl.store(to_value + once + HALF, x_high.to(dtype), mask=value)


@triton.jit
def _norm_and_rotate_backward(
    grad_query, grad_key, grad_value, qkv, q_weight, k_weight, cos, sin, grad_qkv, grad_weights,
    units, S, table_b, table_s, eps, offset,
    G: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, HALF)
    query, key, value = row < R, row == R, row == R + 1
    weight_low = _weights(q_weight, k_weight, column, key, offset)
    weight_high = _weights(q_weight, k_weight, column + HALF, key, offset)
    total_low = tl.zeros([ROWS, HALF], tl.float32)
    total_high = tl.zeros([ROWS, HALF], tl.float32)
    unit = tl.program_id(0).to(tl.int64)
    while unit < units:
        token = unit // G
        from_query = grad_query + unit * R * 2 * HALF + row * 2 * HALF + column[None, :]
        once = unit * 2 * HALF + row * 0 + column[None, :]
        low = tl.load(from_query, mask=query, other=0.0).to(tl.float32)
        low += tl.load(grad_key + once, mask=key, other=0.0).to(tl.float32)
        high = tl.load(from_query + HALF, mask=query, other=0.0).to(tl.float32)
        high += tl.load(grad_key + once + HALF, mask=key, other=0.0).to(tl.float32)
        angle = token // S * table_b + token % S * table_s + column
        cos_low, cos_high = _angles(cos, angle, HALF)
        sin_low, sin_high = _angles(sin, angle, HALF)
        back_low, back_high = low * cos_low + high * sin_high, high * cos_high - low * sin_low

        at = unit * (R + 2) * 2 * HALF + row * 2 * HALF + column[None, :]
        x_low = tl.load(qkv + at, mask=query | key, other=0.0).to(tl.float32)
        x_high = tl.load(qkv + at + HALF, mask=query | key, other=0.0).to(tl.float32)
        scale = _scale(x_low, x_high, eps, HALF)
        x_low *= scale
        x_high *= scale
        by_low, by_high = back_low * x_low, back_high * x_high
        total_low += by_low
        total_high += by_high
        mean = (tl.sum(by_low * weight_low, axis=1) + tl.sum(by_high * weight_high, axis=1))[:, None] / (2 * HALF)
        low = scale * (back_low * weight_low - x_low * mean)
        high = scale * (back_high * weight_high - x_high * mean)
        # Of values there are no others.
        low += tl.load(grad_value + once, mask=value, other=0.0).to(tl.float32)
        high += tl.load(grad_value + once + HALF, mask=value, other=0.0).to(tl.float32)
        dtype = grad_qkv.dtype.element_ty
        tl.store(grad_qkv + at, low.to(dtype), mask=row < R + 2)
        tl.store(grad_qkv + at + HALF, high.to(dtype), mask=row < R + 2)
        unit += tl.num_programs(0)
    own = grad_weights + tl.program_id(0) * 4 * HALF + column
    tl.store(own, tl.sum(tl.where(query, total_low, 0.0), axis=0))
    tl.store(own + HALF, tl.sum(tl.where(query, total_high, 0.0), axis=0))
    tl.store(own + 2 * HALF, tl.sum(tl.where(key, total_low, 0.0), axis=0))
    tl.store(own + 3 * HALF, tl.sum(tl.where(key, total_high, 0.0), axis=0))


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
        rows, warps = _rows(heads, size)
        _norm_and_rotate[(units,)](
            qkv, q_weight, k_weight, *tables, query, key, value, length, *tables.strides, eps, offset,
            groups, heads - 2, size // 2, rows, num_warps=warps,
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
        rows, warps = _rows(heads, size)
        _norm_and_rotate_backward[(programs,)](
            *grads, qkv, q_weight, k_weight, *tables, grad_qkv, parts,
            units, length, *tables.strides, eps, offset,
            groups, heads - 2, size // 2, rows, num_warps=warps,
        )  # fmt: skip
    of_query, of_key = parts.sum(0)
    return grad_qkv, of_query.to(q_weight.dtype, copy=True), of_key.to(k_weight.dtype, copy=True)


def _rows(heads: int, size: int) -> tuple[int, int]:
    """Rows of a program, a power of two, and its warps: 16 values a thread."""
    rows = triton.next_power_of_2(heads)
    return rows, max(1, min(16, rows * size // 512))
