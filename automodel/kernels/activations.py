"""What lies between the two projections of an expert: a function of the gate half and the up half, or of all of it.

They are values that compare equal and can be pickled, so that a spec or a module that holds one can be, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

GatedActivation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(gate [..., F], up [..., F]) -> [..., F]."""


@dataclass(frozen=True, slots=True)
class Gated:
    """activation(gate) * up."""

    activation: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.activation(gate) * up


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """(up + 1) * gate * sigmoid(alpha * gate), where `gate` is at most `limit` and `up` within +-`limit`.

    The activation of GPT-OSS (arXiv 2508.10925, section 2.2).
    """

    alpha: float
    limit: float

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


@dataclass(frozen=True, slots=True)
class Ungated:
    """activation(up), for experts whose first projection has no gate half."""

    activation: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, up: torch.Tensor) -> torch.Tensor:
        return self.activation(up)


def activate(projected: torch.Tensor, activation: GatedActivation | Ungated) -> torch.Tensor:
    """What goes into the second projection [..., F]: of the first one's output [..., 2F], or [..., F] if ungated."""
    if isinstance(activation, Ungated):
        return activation(projected)
    gate, up = projected.chunk(2, dim=-1)
    return activation(gate, up)


SWIGLU = Gated(F.silu)
"""silu(gate) * up."""


def is_swiglu(activation: object) -> bool:
    """Whether `activation` is `SWIGLU` under any of the names that torch and transformers have for silu."""
    return isinstance(activation, Gated) and (
        activation.activation is F.silu or type(activation.activation).__name__ in ("SiLU", "SiLUActivation")
    )


def is_relu_squared(activation: object) -> bool:
    """Whether `activation` is the square of relu without a gate, as transformers calls it."""
    return isinstance(activation, Ungated) and type(activation.activation).__name__ == "ReLUSquaredActivation"
