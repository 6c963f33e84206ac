"""TransformerEngine: whether it can run here.

Its functions are called on our own tensors, and none of its modules is used: parameters keep their names, shapes and
dtypes, no `_extra_state` exists, and a kernel that cannot run raises, where its attention module falls back in silence.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Literal

import torch

from automodel.kernels.packages import is_at_least, is_installed

LinearKernel = Literal["torch", "te", "fp8", "fp8_block"]
OLDEST = (2, 20)
"""The first release with the functions that are called here, and the one that they were measured with."""

_LARGEST_HEAD = 256
_ALIGNMENT = {"te": 8, "fp8": 16, "fp8_block": 128}


def te_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why TransformerEngine cannot run on activations of `dtype`, or None when it can."""
    if device.type != "cuda":
        return "TransformerEngine needs CUDA"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"TransformerEngine is used in half precision, not in {str(dtype).removeprefix('torch.')}"
    return package_obstacle()


def te_attention_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why TransformerEngine's attention, which is cuDNN's, cannot run in heads of `head_dim`, or None when it can."""
    if obstacle := te_obstacle(device, dtype):
        return obstacle
    if head_dim % 8 or head_dim > _LARGEST_HEAD:
        return f"TransformerEngine takes heads of a multiple of 8 up to {_LARGEST_HEAD} values, not of {head_dim}"
    return _cudnn_obstacle()


def te_linear_obstacle(kernel: LinearKernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no linear layer can run `kernel`, or None when those of suitable sizes can."""
    return te_obstacle(device, dtype) or (None if kernel == "te" else _fp8_obstacle(kernel))


def alignment_obstacle(kernel: LinearKernel, *sizes: int) -> str | None:
    """Why `kernel` cannot multiply matrices of these sizes, or None when it can."""
    multiple = _ALIGNMENT[kernel]
    odd = [size for size in sizes if size % multiple]
    return f"{kernel} takes multiples of {multiple}, not {odd[0]}" if odd else None


@torch.compiler.assume_constant_result
def package_obstacle() -> str | None:
    """Why TransformerEngine cannot be imported, or None when it can; found out once, by importing it."""
    return _import() if is_installed("transformer_engine") else "TransformerEngine is not installed"


@cache
def _import() -> str | None:
    if not is_at_least("transformer_engine", *OLDEST):
        return f"TransformerEngine is not of release {'.'.join(map(str, OLDEST))} or newer"
    try:
        # Its libraries are loaded and checked here, against those of torch and CUDA, with errors of many kinds.
        import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        return f"TransformerEngine cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return None


@torch.compiler.assume_constant_result
def _cudnn_obstacle() -> str | None:
    """Its sub-libraries are those that torch has loaded, so that another version cannot run (and does not say so)."""
    import transformer_engine.pytorch as te

    major, minor, patch = te.get_cudnn_version()
    of_torch = torch.backends.cudnn.version()
    if major * 10_000 + minor * 100 + patch == of_torch:
        return None
    return (
        f"TransformerEngine has loaded cuDNN {major}.{minor}.{patch} and torch {of_torch // 10_000}."
        f"{of_torch // 100 % 100}.{of_torch % 100}: set CUDNN_HOME to the folder of torch's cuDNN"
    )


@torch.compiler.assume_constant_result
def _fp8_obstacle(kernel: LinearKernel) -> str | None:
    import transformer_engine.pytorch as te

    available = te.is_fp8_block_scaling_available if kernel == "fp8_block" else te.is_fp8_available
    return available(return_reason=True)[1] or None
