"""The choice of a softmax router as one kernel: the K largest logits of each token and their weights.

Legend: N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx

from automodel.kernels.packages import is_installed

_MOST_EXPERTS = 4096
"""Logits of a row are held in registers."""


def fused_choice_obstacle(device: torch.device, experts: int) -> str | None:
    """Why `choose_experts` cannot run, or None when it can."""
    if device.type != "cuda":
        return "the fused router needs CUDA"
    if not is_installed("triton"):
        return "the fused router needs triton, which is not installed"
    return None if experts <= _MOST_EXPERTS else f"the fused router takes up to {_MOST_EXPERTS:,} experts"


def choose_experts(
    logits_NE: torch.Tensor, top_k: int, dtype: torch.dtype, *, over_chosen: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing weights [N, K] in `dtype` and experts [N, K] (int64), largest first; one operation to torch.compile.

    Weights are the softmax in FP32 over all logits of a token, or over the chosen alone, which is also what dividing
    the former by their sum gives. Of equal logits that of the lower index comes first.
    """
    return _choose(logits_NE, top_k, dtype, over_chosen)


@torch.library.custom_op("automodel::choose_experts", mutates_args=())
def _choose(
    logits_NE: torch.Tensor, top_k: int, dtype: torch.dtype, over_chosen: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from automodel.kernels.triton_router import choose

    return choose(logits_NE.contiguous(), top_k, dtype, over_chosen=over_chosen)


@_choose.register_fake
def _(logits_NE, top_k, dtype, over_chosen):  # type: ignore[no-untyped-def]  # noqa: ARG001
    shape = logits_NE.shape[0], top_k
    return logits_NE.new_empty(shape, dtype=dtype), logits_NE.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("automodel::choose_experts_backward", mutates_args=())
def _choose_backward(
    grad_NK: torch.Tensor, logits_NE: torch.Tensor, index_NK: torch.Tensor, over_chosen: bool
) -> torch.Tensor:
    from automodel.kernels.triton_router import choose_backward

    return choose_backward(grad_NK.contiguous(), logits_NE.contiguous(), index_NK, over_chosen=over_chosen)


@_choose_backward.register_fake
def _(grad_NK, logits_NE, index_NK, over_chosen):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return logits_NE.new_empty(logits_NE.shape)


def _save(
    ctx: FunctionCtx,
    inputs: tuple[torch.Tensor, int, torch.dtype, bool],
    output: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits_NE, _, _, ctx.over_chosen = inputs
    ctx.save_for_backward(logits_NE, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: FunctionCtx, grad_NK: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if grad_NK is None:
        return (None,) * 4
    return _choose_backward(grad_NK, *ctx.saved_tensors, ctx.over_chosen), None, None, None


_choose.register_autograd(_backward, setup_context=_save)
