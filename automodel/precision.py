"""Parameters that stay in FP32 whatever their model is cast to and computes in.

A module whose `keeps_float32` is true casts its own parameters with `keep_float32`, and `parallelize` gathers them
without the cast that mixed precision asks for. What calls it within a compiled layer calls `uncompiled`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def keep_float32(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` as `nn.Module._apply` takes it, but for casts below FP32: of those, only the change of device happens."""

    def applied(tensor: torch.Tensor) -> torch.Tensor:
        result = fn(tensor)
        is_wide = result.dtype in (torch.float32, torch.float64)
        return result if is_wide or not tensor.is_floating_point() else tensor.to(result.device)

    return applied


@torch.compiler.disable
def uncompiled(module: nn.Module, *inputs: torch.Tensor) -> Any:
    """module(*inputs), left alone by torch.compile: FSDP2 gathers such a module by hooks of its own."""
    return module(*inputs)
