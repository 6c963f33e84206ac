"""Several processes of one run: which of them this is, which ones work, and that only the first reports.

Only `python -m ckpt_tools` looks at RANK and WORLD_SIZE, which torchrun sets. The `ckpt` command and the functions do
not: a training job's script that calls them means the one process that it is in.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from ckpt_tools.cli.output import Output

if TYPE_CHECKING:
    from ckpt_tools.engine.ranks import Ranks

SHARED = frozenset({"convert", "consolidate", "train"})
"""Verbs that every process takes part in; any other one is run by the first process."""


def is_bystander(arguments: Sequence[str]) -> bool:
    """Whether this process has nothing to do, because the first one does it all."""
    works = bool(arguments) and arguments[0] in SHARED and not {"--dry-run", "--help", "-h"} & set(arguments)
    return rank() > 0 and not works


def rank() -> int:
    """The number of this process among those of the run; 0 for one that is alone."""
    text = _environment().get("RANK", "")
    return int(text) if text.isdecimal() else 0


def output(json: bool, quiet: bool) -> Output:
    """The sink of this process: all but the first one say nothing but what failed."""
    return Output(quiet=True, speaker=f"rank {rank()}: ") if rank() else Output(json, quiet)


def sharing(destination: str, *, alone: bool = False) -> AbstractContextManager[Ranks | None]:
    """The processes that make the destination together, None where this one is alone."""
    if alone or not _environment().get("RANK"):
        return nullcontext()
    from ckpt_tools.engine.ranks import join_ranks

    return join_ranks(destination, _environment())


def _environment() -> Mapping[str, str]:
    started_as = getattr(sys.modules["__main__"], "__spec__", None)
    return os.environ if started_as is not None and started_as.name == "ckpt_tools.__main__" else {}
