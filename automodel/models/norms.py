"""RMSNorm with FP32 statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from automodel.backends import Backend, resolve_norm


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension.

    The statistics are FP32 whatever the dtype of `x`. The reference kernel rounds to that dtype before it
    multiplies by the weight, as transformers does; the fused one rounds once, after, and so does the reference
    for families in which transformers does.

    Args:
        size: length of the last dimension.
        eps: added to the mean square.
        backend: which kernel runs.
        rounds_last: multiply by the weight before rounding.
    """

    def __init__(self, size: int, eps: float, backend: Backend, *, rounds_last: bool = False) -> None:
        super().__init__()
        self.rounds_last = rounds_last
        self.eps = eps
        self.backend = backend
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if resolve_norm(self.backend, x.device, x.dtype).kernel == "fused":
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype) if self.rounds_last else self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
