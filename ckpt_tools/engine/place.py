"""What a directory that outputs go to is good for: its room, and the shortcuts that its file system takes.

Whether a shortcut works is found by taking it, with temporary files that have no name.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.core.storage import nearest_directory, storage_errors
from ckpt_tools.engine.cloning import shares_blocks
from ckpt_tools.engine.files import writes_behind

_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Place:
    """A directory, or the nearest one above it that exists.

    Attributes:
        path: of the directory that was looked at.
        file_system: its type, such as `ext4`; empty where the system does not tell.
        free: bytes.
        total: bytes.
        shares_blocks: a copy within it can share disk blocks with its source; None where nothing can be written.
        writes_behind: it takes `RWF_DONTCACHE`, with which the disk works while a copy goes on; None alike.
        obstacle: why nothing can be written there, empty where it can.
    """

    path: str
    file_system: str
    free: int
    total: int
    shares_blocks: bool | None
    writes_behind: bool | None
    obstacle: str = ""


def examine_place(path: Path) -> Place:
    """Look at a directory; leaves nothing behind.

    Raises:
        StorageError: it cannot be looked at.
    """
    folder = nearest_directory(path)
    with storage_errors("look at", folder):
        usage = shutil.disk_usage(folder)
        kind = _file_system_of(folder.resolve())
    try:
        found = shares_blocks(folder), writes_behind(folder)
    except OSError as error:
        return Place(str(folder), kind, usage.free, usage.total, None, None, error.strerror or str(error))
    return Place(str(folder), kind, usage.free, usage.total, *found)


def _file_system_of(folder: Path) -> str:
    """The type of the file system that is mounted last on the folder or the nearest one above it."""
    if not _MOUNTS.exists():
        return ""
    kinds: dict[Path, str] = {}
    for line in _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        mount, _, source = line.partition(" - ")
        where = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount.split()[4])
        kinds[Path(where)] = source.split()[0]
    return next((kinds[place] for place in (folder, *folder.parents) if place in kinds), "")
