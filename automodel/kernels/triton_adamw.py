"""The Triton kernel of AdamW: one pass over a parameter, its gradient and its two moments."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _adamw(
    parameter, gradient, first, second, factor, count, decay, beta1, beta2, rate, root_correction, eps,
    HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(parameter + at, mask=inside).to(tl.float32)
    slope = tl.load(gradient + at, mask=inside).to(tl.float32)
    if HAS_FACTOR:
        scale = tl.load(factor)
        slope *= scale
    mean = tl.load(first + at, mask=inside).to(tl.float32)
    mean += (slope - mean) * (1 - beta1)
    square = tl.load(second + at, mask=inside).to(tl.float32)
    square = square * beta2 + slope * slope * (1 - beta2)
    value = value * decay - rate * mean / (tl.sqrt(square) / root_correction + eps)
    if HAS_FACTOR:
        # NaN is no update. Loads do not wait for this.
        inside = at < tl.where(scale == scale, count, 0)  # noqa: PLR0124
    tl.store(parameter + at, value.to(parameter.dtype.element_ty), mask=inside)
    tl.store(first + at, mean.to(first.dtype.element_ty), mask=inside)
    tl.store(second + at, square.to(second.dtype.element_ty), mask=inside)


def adamw_(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: torch.Tensor | None = None,
) -> None:
    """Update parameter and moments in place: arXiv 1711.05101, algorithm 2, in FP32 as `torch.optim.AdamW`.

    Args:
        parameter, gradient, first, second: of one shape, contiguous, each of any floating dtype.
        step: from 1.
        factor: FP32, one element, on the gradient; None is 1. Where it is NaN, nothing is updated.
    """
    count = parameter.numel()
    if count:
        beta1, beta2 = betas
        _adamw[(triton.cdiv(count, _BLOCK),)](
            parameter, gradient, first, second, factor, count, 1 - lr * weight_decay, beta1, beta2,
            lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, eps, factor is not None, _BLOCK, num_warps=8,
        )  # fmt: skip
