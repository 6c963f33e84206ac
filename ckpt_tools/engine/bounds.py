"""What a copy may use: threads, memory and room on the disk, each known before the first byte is written."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.core.errors import ResourceError
from ckpt_tools.core.storage import nearest_directory, storage_errors
from ckpt_tools.engine.ends import Encoded
from ckpt_tools.engine.execute import WINDOW, Progress, default_threads, window_items
from ckpt_tools.engine.plan import Plan
from ckpt_tools.engine.ranges import ROOM
from ckpt_tools.engine.staging import Staging
from ckpt_tools.formats.hf import SideFile
from ckpt_tools.formats.remote import remote_files
from ckpt_tools.layouts.codecs import SCRATCH

PER_THREAD = 4 * WINDOW
"""Upper bound of the bytes that a thread holds for plain leaves: window, cast copy and scratch of a strided piece."""

PER_ENCODED_ITEM = 16
"""Upper bound of the bytes that a thread holds for each item of a window that is quantised: values, codes, and the
values that they read back as."""

SLACK = 16 << 20
"""Disk left free beyond the plan, for the journal and the file system's own records."""


@dataclass(frozen=True)
class CopyOptions:
    """How a copy is run.

    Attributes:
        overwrite: an existing output may be replaced; it stays until the new one is whole.
        threads: worker threads, None for the default.
        memory: upper bound of buffers in bytes, None for no bound.
        progress: told of bytes as they are written.
        strict: blocks that the plan shares and that cannot be shared are an error.
        digests: leaves that share their blocks with the source are read, too.
        sha256: write `SHA256SUMS` beside the files.
    """

    overwrite: bool = False
    threads: int | None = None
    memory: int | None = None
    progress: Progress | None = None
    strict: bool = False
    digests: bool = False
    sha256: bool = False

    def bounded_threads(self, per_thread: int = PER_THREAD, shared: int = 0) -> int:
        """Threads that fit into the memory bound, each holding up to `per_thread` bytes, and all together `shared`.

        Raises:
            ResourceError: not even one does.
        """
        wanted = self.threads or default_threads()
        if self.memory is None:
            return wanted
        fitting, least = (self.memory - shared) // per_thread, per_thread + shared
        if fitting < 1:
            raise ResourceError(
                f"a memory bound of {self.memory:,} bytes is below the {least:,} that one thread needs",
                hint=f"give --memory {-(-least // (1 << 20))}MiB or more",
            )
        return min(wanted, fitting)


def thread_bytes(plan: Plan) -> int:
    """Upper bound of the bytes that one thread of the plan holds: whole blocks of a quantised leaf can be large, and
    so can windows of transposed ones."""
    # What is shared is neither transposed nor encoded.
    moved = [copy for copy in plan.copies if copy.name not in plan.sharing.leaves]
    window = max((window_items(copy) * copy.source.itemsize for copy in moved), default=0)
    plain = PER_THREAD + max(0, window - WINDOW)
    encoded = (window_items(c) for c in moved if isinstance(c.source, Encoded) or isinstance(c.target, Encoded))
    items = max(encoded, default=0)
    return max(plain, PER_ENCODED_ITEM * items + SCRATCH) if items else plain


def shared_bytes(plan: Plan) -> int:
    """Upper bound of the bytes that all threads of the plan hold together: blocks of a remote source."""
    return 0 if remote_files(plan.source.root) is None else ROOM


def check_disk(destination: Path, needed: int) -> None:
    """Raises `ResourceError` when the file system of `destination` has less than `needed` bytes free."""
    folder = nearest_directory(destination)
    with storage_errors("look at", folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{destination} needs {needed / 1e9:,.2f} GB and {folder} has {free / 1e9:,.2f} GB free",
            hint="free space or choose another disk; nothing was written",
        )


def check_room(plan: Plan, staging: Staging, side_files: Mapping[str, SideFile | bytes], shared: int) -> None:
    """Raises `ResourceError` when the disk has no room for what is not there yet and does not share its blocks.

    Args:
        plan: what is copied.
        staging: where to.
        side_files: what is written beside it.
        shared: bytes that share their blocks with the source.
    """
    beside = sum(map(len, plan.target.documents.values()))
    for content in side_files.values():
        if isinstance(content, SideFile):
            with storage_errors("look at", content.root / content.name):
                beside += os.stat(content.root / content.name).st_size
        else:
            beside += len(content)
    # Blocks that an interrupted run shared count as used, although they took no room.
    there = max(0, _bytes_used(staging.path) - shared)
    try:
        check_disk(staging.final, max(0, plan.nbytes_written - shared + beside + SLACK - there))
    except ResourceError:
        # An empty directory is of no use to a rerun.
        with contextlib.suppress(OSError):
            staging.path.rmdir()
        raise


def _bytes_used(folder: Path) -> int:
    with storage_errors("look at", folder):
        return sum(os.stat(p).st_blocks * 512 for p in folder.rglob("*") if p.is_file())
