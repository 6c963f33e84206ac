"""Which optional packages of kernels are there."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def is_installed(package: str) -> bool:
    """Whether a package can be imported; asked of the file system once, since layers ask in every step."""
    return find_spec(package) is not None
