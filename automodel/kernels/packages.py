"""Which optional packages of kernels are there, and what is asked of those that are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from itertools import takewhile

import torch

from ckpt_tools.core.packages import Package, is_found

KERNEL_PACKAGES = (
    Package("triton", "triton", "fused experts, routers, loss and AdamW, compiled layers", "triton"),
    Package("flash-attn-4", "flash_attn.cute", "attention", "'flash-attn-4>=4.0.0b1'"),
    Package(
        "transformer-engine",
        "transformer_engine",
        "attention, linear layers and FP8, norms, experts",
        "--no-build-isolation 'transformer-engine[pytorch]>=2.20'",
    ),
    Package("quack-kernels", "quack", "products of experts, SonicMoE's", "'quack-kernels>=0.6.2,<0.7'"),
    Package("deep_ep", "deep_ep", "dispatch", "--no-build-isolation git+https://github.com/deepseek-ai/DeepEP"),
    Package("mamba_ssm", "mamba_ssm", "Mamba-2 layers", "--no-build-isolation mamba-ssm"),
    Package(
        "causal_conv1d",
        "causal_conv1d",
        "convolutions of Mamba-2 and DeltaNet layers",
        "--no-build-isolation causal-conv1d",
    ),
    Package("flash-linear-attention", "fla", "DeltaNet layers", "flash-linear-attention"),
    Package("liger-kernel", "liger_kernel", "models of transformers", "liger-kernel"),
)
"""Packages that bring kernels; none is needed."""

_misses: ContextVar[list[str] | None] = ContextVar("misses", default=None)


@torch.compiler.assume_constant_result
def is_installed(package: str) -> bool:
    """Whether a package can be imported; asked of the file system once, since layers ask in every step."""
    found = _found(package)
    misses = _misses.get()
    if not found and misses is not None:
        misses.append(package)
    return found


@contextmanager
def recorded_misses() -> Iterator[list[str]]:
    """The packages that `is_installed` is asked for inside and that are not there: what faster kernels lack."""
    misses: list[str] = []
    token = _misses.set(misses)
    try:
        yield misses
    finally:
        _misses.reset(token)


@torch.compiler.assume_constant_result
def is_at_least(distribution: str, *release: int) -> bool:
    """Whether a distribution is installed in this release or a newer one, `is_at_least("triton", 3, 3)`.

    It does not count as missed where it is not: this is also asked of packages that `backend="auto"` does not take.
    """
    return _release(distribution)[: len(release)] >= release


@cache
def _release(distribution: str) -> tuple[int, ...]:
    try:
        parts = metadata.version(distribution).split(".")
    except metadata.PackageNotFoundError:
        return ()
    return tuple(int(part) for part in takewhile(str.isdecimal, parts))


@cache
def _found(package: str) -> bool:
    return is_found(package)
