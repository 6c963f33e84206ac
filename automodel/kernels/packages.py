"""Which optional packages of kernels are there."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


@torch.compiler.assume_constant_result
def is_installed(package: str) -> bool:
    """Whether a package can be imported; asked of the file system once, since layers ask in every step."""
    return _found(package)


@cache
def _found(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        # A package whose parent is missing.
        return False
