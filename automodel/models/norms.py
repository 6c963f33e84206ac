"""RMSNorm with FP32 statistics, plain and with a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from automodel.backends import Backend, resolve_norm
from automodel.kernels.te_norm import te_rms_norm


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension.

    The statistics are FP32 whatever the dtype of `x`. The reference kernel rounds to that dtype before it
    multiplies by the weight, as transformers does; the others round once, after, and so does the reference
    for families in which transformers does.

    Args:
        size: length of the last dimension.
        eps: added to the mean square.
        backend: which kernel runs.
        rounds_last: multiply by the weight before rounding.
        zero_centred: the parameter is the weight less 1 (Qwen3-Next), which half precision resolves better near 1;
            the factor is formed and applied in FP32, by either kernel.
    """

    def __init__(
        self, size: int, eps: float, backend: Backend, *, rounds_last: bool = False, zero_centred: bool = False
    ) -> None:
        super().__init__()
        self.rounds_last = rounds_last
        self.zero_centred = zero_centred
        self.eps = eps
        self.backend = backend
        self.weight = nn.Parameter(torch.zeros(size) if zero_centred else torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = resolve_norm(self.backend, x.device, x.dtype).kernel
        if kernel == "te":
            return te_rms_norm(x, self.weight.to(x.dtype), self.eps, zero_centred=self.zero_centred)
        fused = kernel == "fused"
        if self.zero_centred:
            weight = 1.0 + self.weight.float()
            wide = x.float()
            if fused:
                return F.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)
            return (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps))).to(x.dtype)
        if fused:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype) if self.rounds_last else self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class GatedRMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) * silu(gate) over the last dimension, rounded as transformers does.

    Args:
        size: length of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide.to(x.dtype) * F.silu(gate.float())).to(x.dtype)
