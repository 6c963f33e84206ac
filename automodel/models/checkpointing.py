"""Selective activation checkpointing: attention keeps its input and its output, and makes the rest again.

Between the two lie a norm, the projections to queries, keys and values, their norms and rotary embeddings: most of what
a layer keeps beside its experts, and cheap to compute again. The attention itself, which is not, does not run again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import automodel.kernels.flash  # noqa: F401  registers its operation

_Attended = tuple[torch.Tensor, torch.Tensor | None]

_KEPT = [
    torch.ops.automodel.causal_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""Operations whose results are kept. What torch makes of a mask where no kernel takes it is not among them."""


def keeping_attention(attend: Callable[..., _Attended], *inputs: object) -> _Attended:
    """attend(*inputs), of which autograd keeps the tensors among the inputs and the results of attention kernels.

    No state of random numbers is kept: nothing random may be in it, as `selective_checkpointing_enable` sees to.
    """
    return checkpoint(attend, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return create_selective_checkpoint_contexts(_KEPT)
