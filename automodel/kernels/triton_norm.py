"""The Triton kernel of gradient norms: sums of squares in one pass at the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_BLOCK = 8192


@triton.jit
def _square_sums(values, sums, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + at, mask=at < count, other=0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(value * value))


def square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements: FP64, 0-d, the same bits in every run.

    Blocks of 8,192 elements are summed in FP32, and the sums of blocks in FP64.

    Args:
        tensors: contiguous, of any floating dtype, on one device; at least one.
    """
    blocks = [triton.cdiv(tensor.numel(), _BLOCK) for tensor in tensors]
    sums = torch.empty(sum(blocks), dtype=torch.float32, device=tensors[0].device)
    begin = 0
    for tensor, count in zip(tensors, blocks, strict=True):
        if count:
            _square_sums[(count,)](tensor, sums[begin:], tensor.numel(), _BLOCK, num_warps=8)
        begin += count
    return sums.double().sum()
