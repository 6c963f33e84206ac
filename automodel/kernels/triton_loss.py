"""The Triton kernel of the loss: softmax cross-entropy of each row of logits, and its gradient over them in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_SCALED = 8192
_LEAST = tl.constexpr(-3.4e38)


@triton.jit
def _softmax_gradient(logits, labels, losses, divisor, ignored, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    own = logits + row * V
    # Two values at once: sums are rescaled half as often, and exp is what takes longest beside the loads. No logit is
    # below the first bound, so that lanes past the end, where all is -inf, add nothing and no difference is NaN.
    largest = tl.full([BLOCK], _LEAST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, 2 * BLOCK):
        column = start + tl.arange(0, BLOCK)
        one = tl.load(own + column, mask=column < V, other=float("-inf")).to(tl.float32)
        other = tl.load(own + column + BLOCK, mask=column + BLOCK < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.maximum(one, other))
        total = total * tl.exp(largest - larger) + tl.exp(one - larger) + tl.exp(other - larger)
        largest = larger
    top = tl.max(largest, axis=0)
    normalizer = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    counts = label != ignored
    chosen = tl.load(own + label, mask=counts, other=0.0).to(tl.float32)
    tl.store(losses + row, tl.where(counts, normalizer - chosen, 0.0))
    scale = tl.where(counts, 1.0 / tl.load(divisor), 0.0)
    for start in tl.range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(own + column, mask=column < V, other=float("-inf"), eviction_policy="evict_first")
        value = value.to(tl.float32)
        gradient = (tl.exp(value - normalizer) - tl.where(column == label, 1.0, 0.0)) * scale
        tl.store(own + column, gradient.to(logits.dtype.element_ty), mask=column < V, cache_modifier=".cs")


@triton.jit
def _scale(values, factor, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(values + at, mask=inside).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def scaled(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values * factor in `dtype`, rounded once; `values` contiguous, `factor` of one element on the same device."""
    out = torch.empty_like(values, dtype=dtype)
    count = values.numel()
    if count:
        _scale[(triton.cdiv(count, _SCALED),)](values, factor, out, count, _SCALED, num_warps=8)
    return out


def softmax_gradient(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, divisor: torch.Tensor, ignore_index: int
) -> None:
    """Write each row's cross-entropy, and over the logits the gradient of the sum of losses over `divisor`.

    Args:
        logits: [C, V], contiguous; overwritten.
        labels: int64 [C]; rows with `ignore_index` have loss and gradient 0.
        losses: FP32 [C], written.
        divisor: FP32, 0-d.
    """
    rows, vocabulary = logits.shape
    if rows:
        block = min(2048, triton.next_power_of_2(vocabulary))
        _softmax_gradient[(rows,)](logits, labels, losses, divisor, ignore_index, vocabulary, block, num_warps=8)
