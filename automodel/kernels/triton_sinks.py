"""The Triton kernel that gives attention its sinks afterwards: see `flash`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ELEMENTS = 1024
"""Of the output, that one program takes."""


@triton.jit
def _add_sinks(
    out, sums, sinks, to_out, to_sums, rows, S,
    sums_b, sums_s, sums_h,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    head, token = row % H, row // H
    at = (token // S).to(tl.int64) * sums_b + token % S * sums_s + head * sums_h
    before = tl.load(sums + at, mask=there, other=0.0)
    sink = tl.load(sinks + head, mask=there, other=0.0).to(tl.float32)
    # The larger one first, so that exp is at most 1; both may be -inf, whose difference is NaN.
    top = tl.maximum(before, sink)
    after = tl.where(top == float("-inf"), top, top + tl.log(tl.exp(before - top) + tl.exp(sink - top)))
    tl.store(to_sums + row, after, mask=there)
    column = tl.arange(0, BLOCK)
    inside = there[:, None] & (column < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + column[None, :]
    value = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    value *= tl.exp(before - after)[:, None]
    tl.store(to_out + place, value.to(to_out.dtype.element_ty), mask=inside)


def add_sinks(out: torch.Tensor, sums: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a softmax that a sink of each head joins, from those of the one without.

    Args:
        out: [B, S, H, d].
        sums: log-sum-exp, FP32 [B, S, H], of any strides.
        sinks: [H].

    Returns:
        [B, S, H, d] in the dtype of `out`, and FP32 [B, S, H]; both contiguous.
    """
    out = out.contiguous()
    batch, length, heads, size = out.shape
    rows, block = batch * length * heads, triton.next_power_of_2(size)
    made, with_sink = torch.empty_like(out), sums.new_empty(sums.shape)
    if rows:
        at_once = max(1, _ELEMENTS // block)
        _add_sinks[(triton.cdiv(rows, at_once),)](
            out, sums, sinks.contiguous(), made, with_sink, rows, length, *sums.stride(),
            heads, size, at_once, block, num_warps=4,
        )  # fmt: skip
    return made, with_sink
