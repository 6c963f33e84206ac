"""Norms of query and key heads and their rotation as one operation, from the fused projection to what attention takes.

Legend: B batch, S sequence, G kv heads, R query heads of each, d head_dim.
"""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx

from automodel.kernels.packages import is_installed


def fused_heads_obstacle(device: torch.device, head_dim: int, rotary_dim: int) -> str | None:
    """Why `norm_and_rotate` cannot run, or None when it can."""
    if device.type != "cuda":
        return "norms and rotation in one kernel need CUDA"
    if not is_installed("triton"):
        return "norms and rotation in one kernel need triton, which is not installed"
    if head_dim != rotary_dim or head_dim & (head_dim - 1):
        return f"norms and rotation in one kernel take heads of a power of two values, all rotated, not {head_dim}"
    return None


def norm_and_rotate(
    qkv_BSGRd: torch.Tensor,
    q_weight_d: torch.Tensor,
    k_weight_d: torch.Tensor,
    cos_BSd: torch.Tensor,
    sin_BSd: torch.Tensor,
    *,
    eps: float,
    zero_centred: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, S, G * R, d] and keys [B, S, G, d], normed (RMSNorm over d) and rotated, and values [B, S, G, d].

    Computed in FP32 and rounded once.

    Args:
        qkv_BSGRd: [B, S, G, R + 2, d]: of each group its queries, its key and its value.
        q_weight_d, k_weight_d: of the norms; with `zero_centred` less 1.
        cos_BSd, sin_BSd: rotary tables of all d dimensions, pairs (i, i + d / 2); their batch may be 1.
    """
    return _norm_and_rotate(qkv_BSGRd, q_weight_d, k_weight_d, cos_BSd, sin_BSd, eps, float(zero_centred))


@torch.library.custom_op("automodel::norm_and_rotate", mutates_args=())
def _norm_and_rotate(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from automodel.kernels import triton_heads

    tables = triton_heads.Tables(cos.contiguous(), sin.contiguous())
    return triton_heads.norm_and_rotate(qkv.contiguous(), q_weight, k_weight, tables, eps, offset)


@_norm_and_rotate.register_fake
def _(qkv, q_weight, k_weight, cos, sin, eps, offset):  # type: ignore[no-untyped-def]  # noqa: ARG001
    batch, length, groups, heads, size = qkv.shape
    kept = (batch, length, groups, size)
    return qkv.new_empty(batch, length, groups * (heads - 2), size), qkv.new_empty(kept), qkv.new_empty(kept)


@torch.library.custom_op("automodel::norm_and_rotate_backward", mutates_args=())
def _norm_and_rotate_backward(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from automodel.kernels import triton_heads

    grads = grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous()
    tables = triton_heads.Tables(cos.contiguous(), sin.contiguous())
    return triton_heads.norm_and_rotate_backward(grads, qkv.contiguous(), q_weight, k_weight, tables, eps, offset)


@_norm_and_rotate_backward.register_fake
def _(grad_query, grad_key, grad_value, qkv, q_weight, k_weight, cos, sin, eps, offset):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return qkv.new_empty(qkv.shape), q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


def _save(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[torch.Tensor, ...]) -> None:  # noqa: ARG001
    *tensors, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    found = _norm_and_rotate_backward(*grads, *ctx.saved_tensors, ctx.eps, ctx.offset)
    return *found, None, None, None, None


_norm_and_rotate.register_autograd(_backward, setup_context=_save)
