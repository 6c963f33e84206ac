"""The folder of a run's checkpoints: names, the latest one, and how many are kept."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ckpt_tools.core.storage import storage_errors

_STEP = re.compile(r"step-(\d{6,})")


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return root / f"step-{step:06d}"


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints in `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / ".metadata").is_file()]


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint in `root`, or None."""
    found = checkpoints(root)
    return found[-1] if found else None


def remove_old(root: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints; each vanishes under its name before its files go.

    Raises:
        StorageError: one could not be removed.
    """
    for path in checkpoints(root)[:-keep_last]:
        doomed = path.with_name(f".{path.name}.removed")
        with storage_errors("remove", path):
            path.rename(doomed)
            shutil.rmtree(doomed)
