"""Which of torch's kernels `scaled_dot_product_attention` takes first."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.nn.attention import SDPBackend, sdpa_kernel

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def cudnn_first(attend: Callable[_Args, _Result], *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
    """attend(*args, **kwargs), in which cuDNN's kernel comes first where it can run, and torch's order follows."""
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        return attend(*args, **kwargs)
