"""The choice of DeepSeek V3's router as one kernel, from logits to routing weights.

Legend: N tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx


def choose_in_groups(
    logits_NE: torch.Tensor,
    bias_E: torch.Tensor,
    top_k: int,
    *,
    groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing weights [N, K] in FP32 and experts [N, K] (int64), largest first; one operation to torch.compile.

    What `moe.group_router.GroupLimitedRouter` says; of equal scores that of the lower index comes first.

    Args:
        logits_NE: FP32.
        bias_E: FP32, added to the scores for the choice alone; no gradient reaches it.
    """
    return _choose(logits_NE, bias_E, top_k, groups, top_groups, normalize, scale)


@torch.library.custom_op("automodel::choose_in_groups", mutates_args=())
def _choose(
    logits_NE: torch.Tensor,
    bias_E: torch.Tensor,
    top_k: int,
    groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    from automodel.kernels import triton_group_router as kernels

    return kernels.choose_in_groups(
        logits_NE.contiguous(),
        bias_E.contiguous(),
        top_k,
        groups=groups,
        top_groups=top_groups,
        normalize=normalize,
        scale=scale,
    )


@_choose.register_fake
def _(logits_NE, bias_E, top_k, groups, top_groups, normalize, scale):  # type: ignore[no-untyped-def]  # noqa: ARG001
    shape = logits_NE.shape[0], top_k
    return logits_NE.new_empty(shape), logits_NE.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("automodel::choose_in_groups_backward", mutates_args=())
def _choose_backward(
    grad_NK: torch.Tensor, logits_NE: torch.Tensor, index_NK: torch.Tensor, normalize: bool, scale: float
) -> torch.Tensor:
    from automodel.kernels import triton_group_router as kernels

    return kernels.choose_in_groups_backward(
        grad_NK.contiguous(), logits_NE.contiguous(), index_NK, normalize=normalize, scale=scale
    )


@_choose_backward.register_fake
def _(grad_NK, logits_NE, index_NK, normalize, scale):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return logits_NE.new_empty(logits_NE.shape)


def _save(
    ctx: FunctionCtx,
    inputs: tuple[torch.Tensor, torch.Tensor, int, int, int, bool, float],
    output: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits_NE, *_, ctx.normalize, ctx.scale = inputs
    ctx.save_for_backward(logits_NE, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: FunctionCtx, grad_NK: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if grad_NK is None:
        return (None,) * 7
    return _choose_backward(grad_NK, *ctx.saved_tensors, ctx.normalize, ctx.scale), *(None,) * 6


_choose.register_autograd(_backward, setup_context=_save)
