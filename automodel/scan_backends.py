"""Which kernels run the layers that scan: Mamba-2, and the gated delta rule with its convolution."""

from __future__ import annotations

import torch

from automodel.backends import Backend, Resolved, named_or_fastest
from automodel.kernels.delta_rule import DeltaRuleKernel, fla_obstacle
from automodel.kernels.mamba import MambaKernel, fused_mamba_obstacle
from automodel.kernels.short_conv import causal_conv1d_obstacle


def resolve_mamba(
    backend: Backend, device: torch.device, dtype: torch.dtype, channels: int, width: int
) -> Resolved[MambaKernel]:
    """The kernels of Mamba-2 layers whose convolution has `channels` and a kernel of `width`.

    Raises:
        UsageError: `fused` was asked for by name and cannot run.
    """
    return named_or_fastest(
        "mamba", backend.mamba, "fused", lambda: fused_mamba_obstacle(device, dtype, channels, width)
    )


def resolve_delta_rule(
    backend: Backend, device: torch.device, dtype: torch.dtype, *, training: bool
) -> Resolved[DeltaRuleKernel]:
    """The kernel of the gated delta rule for activations of `dtype`.

    Raises:
        UsageError: `fla` was asked for by name and cannot run.
    """
    return named_or_fastest(
        "linear attention", backend.linear_attention, "fla", lambda: fla_obstacle(device, dtype, training=training)
    )


def resolve_short_conv(backend: Backend, device: torch.device) -> Resolved:
    """The kernel of the convolution before the gated delta rule: `"fused"` or `"torch"`."""
    if backend.linear_attention == "torch":
        return Resolved("torch", "asked for")
    obstacle = causal_conv1d_obstacle(device)
    return Resolved("fused") if obstacle is None else Resolved("torch", obstacle)
