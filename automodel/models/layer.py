"""What the layers of every decoder have in common: how they are called, and whether they run compiled.

Legend: B batch, S sequence, D hidden, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from automodel.backends import Backend, resolve_layers
from automodel.models.checkpointing import keeping_attention
from automodel.models.spec import AttentionKind

LayerOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Hidden states [B, S, D], attention probabilities (eager attention only), router logits (expert layers only)."""


class Scanning(Protocol):
    """A token mixer with a recurrence."""

    def has_kernels(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether kernels scan there, which torch.compile leaves alone; the loops of the references it would unroll."""
        ...


class Layer(GradientCheckpointingLayer):
    """A layer of a decoder; in training `_run` goes through torch.compile, where that gains anything.

    Args:
        kind: of its token mixer.
        backend: kernels.

    Attributes:
        recomputes_attention: in training, as `models.checkpointing` says.
    """

    def __init__(self, kind: AttentionKind, backend: Backend) -> None:
        super().__init__()
        self.kind = kind
        self.backend = backend
        self.recomputes_attention = False

    def forward(
        self,
        x_BSD: torch.Tensor,
        cos_BSd: torch.Tensor | None,
        sin_BSd: torch.Tensor | None,
        mask: Any,
        kernel: str,
        past_key_values: Cache | None = None,
        cache_position: torch.Tensor | None = None,
    ) -> LayerOutput:
        """`_run`, compiled or as it is."""
        training = self.training and torch.is_grad_enabled()
        compiled = resolve_layers(self.backend, x_BSD.device, training=training).kernel == "compiled"
        run = _compiled(type(self)) if compiled and self.can_compile(x_BSD.device, x_BSD.dtype) else type(self)._run
        return run(self, x_BSD, cos_BSd, sin_BSd, mask, kernel, past_key_values, cache_position)

    def _mixed(
        self,
        x_BSD: torch.Tensor,
        cos_BSd: torch.Tensor | None,
        sin_BSd: torch.Tensor | None,
        mask: Any,
        kernel: str,
        past_key_values: Cache | None,
        cache_position: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`_mix`, of which autograd keeps less where that was asked for."""
        inputs = (x_BSD, cos_BSd, sin_BSd, mask, kernel, past_key_values, cache_position)
        again = self.recomputes_attention and self.training and past_key_values is None
        return keeping_attention(self._mix, *inputs) if again else self._mix(*inputs)

    def _mix(self, x_BSD: torch.Tensor, *inputs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The norm and the token mixer: its output, and attention probabilities (eager attention only)."""
        raise NotImplementedError

    def can_compile(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether torch.compile gains anything for activations of `dtype`."""
        return self.kind != "linear_attention" or self._scanning().has_kernels(device, dtype)

    def _scanning(self) -> Scanning:
        """The mixer of a layer of linear attention."""
        raise NotImplementedError

    def _run(self, *inputs: Any) -> LayerOutput:
        """The layer, of what `forward` is given."""
        raise NotImplementedError


@cache
def _compiled(layer: type[Layer]) -> Callable[..., LayerOutput]:
    # What is inside the hooks of FSDP and of checkpointing, and one function, so that all layers share its graphs.
    return torch.compile(layer._run)
