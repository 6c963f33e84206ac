"""Which kernel runs softmax attention: over whole rows, and within documents and windows."""

from __future__ import annotations

import torch

from automodel.backends import Backend, Resolved, refuse
from automodel.kernels.flash import flash4_obstacle, flash_obstacle
from automodel.kernels.measured import by_speed
from automodel.kernels.te import te_attention_obstacle


def resolve_sdpa(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> Resolved:
    """The kernel of causal attention over whole rows, in heads of `head_dim`: `"flash4"`, `"te"`, or which kernel
    `scaled_dot_product_attention` is to prefer. `auto` goes by `measured.ATTENTION`.

    Raises:
        UsageError: `flash4` or `te` was asked for by name and cannot run.
    """
    if backend.sdpa in ("torch", "cudnn"):
        return Resolved(backend.sdpa, "" if backend.sdpa == "cudnn" else "asked for")
    if backend.sdpa != "auto":
        if obstacle := _attention_obstacle(backend.sdpa, device, dtype, head_dim):
            refuse("attention", backend.sdpa, obstacle)
        return Resolved(backend.sdpa)
    if device.type != "cuda" or dtype == torch.float32:
        return Resolved("torch")
    return _fastest(by_speed("flash4", "cudnn", "te"), "torch", device, dtype, head_dim)


def resolve_spans(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> Resolved:
    """The kernel of attention within documents and windows: `"flash4"`, `"te"`, torch's `"flash"`, or SDPA under a
    `"mask"`. `auto` goes by `measured.ATTENTION`.

    Raises:
        UsageError: `flash4` or `te` was asked for by name and cannot run.
    """
    if backend.sdpa == "torch":
        return Resolved("mask", "asked for")
    if backend.sdpa in ("flash4", "te"):
        return resolve_sdpa(backend, device, dtype, head_dim)
    if obstacle := flash_obstacle(device, dtype, head_dim):
        return Resolved("mask", obstacle)
    if backend.sdpa == "cudnn":
        return Resolved("flash")
    return _fastest(by_speed("flash4", "te"), "flash", device, dtype, head_dim)


def _fastest(kernels: list[str], last: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Resolved:
    """The first attention kernel that can run, or the last, and what keeps those before it from running."""
    reasons = []
    for kernel in kernels:
        obstacle = _attention_obstacle(kernel, device, dtype, head_dim)
        if obstacle is None:
            return Resolved(kernel, "; ".join(reasons))
        if obstacle not in reasons:
            reasons.append(obstacle)
    return Resolved(last, "; ".join(reasons))


def _attention_obstacle(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    # Before packages are looked for, which would not help.
    if device.type == "cuda" and _capability(device.index or 0) < (9, 0):
        return "FlashAttention-4 and cuDNN's attention need compute capability 9.0"
    if kernel == "flash4":
        return flash4_obstacle(device, dtype, head_dim)
    return te_attention_obstacle(device, dtype, head_dim) if kernel == "te" else None


@torch.compiler.assume_constant_result
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
