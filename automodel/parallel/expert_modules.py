"""Experts that are modules of their own, as transformers 4 has them: each gets a gradient on every process.

FSDP2 reduces the gradients that there are. An expert that had tokens on one process and none on another would make
their collectives differ, and the job hang or die; a gradient of zeros is what the expert without tokens contributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import FunctionCtx


def give_every_expert_a_gradient(model: nn.Module) -> None:
    """Add to blocks with a list `experts` of modules what makes all of them take part in the backward pass.

    Call it before the model is sharded: at the time of the hook the parameters have to be whole.
    """
    for module in model.modules():
        if isinstance(getattr(module, "experts", None), nn.ModuleList):
            module.register_forward_hook(_all_take_part)


def _all_take_part(block: nn.Module, _inputs: object, output: Any) -> Any:
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    hidden = _TakePart.apply(hidden, *block.experts.parameters())
    return (hidden, *rest) if isinstance(output, tuple) else hidden


class _TakePart(torch.autograd.Function):
    """The first argument; the others get gradients of zeros."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) if p.requires_grad else None for p in parameters]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zeros = (like and torch.zeros(like[0], dtype=like[1], device=like[2]) for like in ctx.like)
        return gradient, *zeros
