"""Which optional packages of kernels are there."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import takewhile

import torch


@torch.compiler.assume_constant_result
def is_installed(package: str) -> bool:
    """Whether a package can be imported; asked of the file system once, since layers ask in every step."""
    return _found(package)


@torch.compiler.assume_constant_result
def is_at_least(distribution: str, *release: int) -> bool:
    """Whether a distribution is installed in this release or a newer one, `is_at_least("triton", 3, 3)`."""
    return _release(distribution)[: len(release)] >= release


@cache
def _release(distribution: str) -> tuple[int, ...]:
    try:
        parts = version(distribution).split(".")
    except PackageNotFoundError:
        return ()
    return tuple(int(part) for part in takewhile(str.isdecimal, parts))


@cache
def _found(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        # A package whose parent is missing.
        return False
