"""Moves mixture-of-experts checkpoints between Hugging Face and training layouts, and proves that nothing was lost.

    from ckpt_tools import convert, consolidate, verify

The functions are those of the `ckpt` command, with the same parameters. Importing this package imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ckpt_tools.version import __version__

if TYPE_CHECKING:
    from ckpt_tools.api import (
        CopyReport,
        consolidate,
        convert,
        diff,
        explain,
        inspect,
        join_ranks,
        list_families,
        plan,
        roundtrip,
        verify,
    )
    from ckpt_tools.core.errors import CkptError

__all__ = [
    "CkptError",
    "CopyReport",
    "__version__",
    "consolidate",
    "convert",
    "diff",
    "explain",
    "inspect",
    "join_ranks",
    "list_families",
    "plan",
    "roundtrip",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "ckpt_tools.core.errors" if name == "CkptError" else "ckpt_tools.api"
    return getattr(import_module(module), name)
