"""RMSNorm through TransformerEngine's kernels."""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx


def te_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, zero_centred: bool = False) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, computed in FP32 and rounded once.

    Args:
        x: [..., size], of one half-precision dtype with `weight` [size].
        zero_centred: the factor is 1 + weight.
    """
    return _rms_norm(x.flatten(0, -2), weight, eps, zero_centred)[0].view(x.shape)


@torch.library.custom_op("automodel::te_rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows, and the reciprocal of each row's root mean square, FP32 [rows]."""
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.cpp_extensions import rmsnorm_fwd

    out, _, scales = rmsnorm_fwd(x.contiguous(), weight, eps, None, None, TE_DType[x.dtype], 0, zero_centred)
    return out, scales


@_rms_norm.register_fake
def _(x, weight, eps, zero_centred):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op("automodel::te_rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zero_centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from transformer_engine.pytorch.cpp_extensions import rmsnorm_bwd

    grad_x, grad_weight = rmsnorm_bwd(grad.contiguous(), x.contiguous(), scales, weight, 0, zero_centred)
    return grad_x, grad_weight


@_rms_norm_backward.register_fake
def _(grad, x, weight, scales, zero_centred):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(
    ctx: FunctionCtx,
    inputs: tuple[torch.Tensor, torch.Tensor, float, bool],
    output: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x, weight, _, ctx.zero_centred = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: FunctionCtx, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    return (*_rms_norm_backward(grad, *ctx.saved_tensors, ctx.zero_centred), None, None)


_rms_norm.register_autograd(_backward, setup_context=_save)
