"""Puts leaves into place by sharing disk blocks: `FICLONERANGE`, as XFS, Btrfs and others have it.

Whether two files can share blocks is found by trying. What is shared is copied by the file system when either side is
written later, so the source may be changed or deleted afterwards.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.paths import open_input
from ckpt_tools.core.scratch import scratch
from ckpt_tools.engine.execute import WINDOW, run_threads
from ckpt_tools.engine.files import FileReader, FileWriter, storage_errors
from ckpt_tools.engine.sharing import Placement, Run

_FICLONERANGE = 0x4020940D
_ARGUMENTS = struct.Struct("=qQQQ")
_CANNOT = frozenset(
    {
        errno.EXDEV,  # another file system
        errno.EOPNOTSUPP,  # one that does not share blocks
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EINVAL,  # these two files do not, such as one without copy on write on Btrfs, or other blocks
        errno.ETXTBSY,  # a swap file
        errno.EPERM,
        errno.EACCES,
    }
)
BLOCK = 4096
"""Bytes of a block where the file system names no usable size. Network file systems give the size of a transfer."""
_LARGEST_BLOCK = 1 << 17


def clone_range(source: int, source_position: int, target: int, target_position: int, nbytes: int) -> bool:
    """Makes a range of one open file share the blocks of a range of another.

    Positions and `nbytes` are multiples of the file system's block; the target is as it was where this fails.

    Returns:
        False where these files cannot share blocks.

    Raises:
        OSError: they can, and it failed: no space for the file system's records, an I/O error.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONERANGE, _ARGUMENTS.pack(source, source_position, nbytes, target_position))
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def block_size(fd: int) -> int:
    """Bytes of the blocks that the file system of an open file shares."""
    size = os.fstatvfs(fd).f_bsize
    return size if 0 < size <= _LARGEST_BLOCK and not size & (size - 1) else BLOCK


def shareable_block(files: Iterable[Path], folder: Path) -> int | None:
    """Bytes of a block if the first of the files that has one can share it with a new file in a folder, else None.

    Leaves nothing behind. A folder that does not exist yet stands for its nearest parent that does.
    """
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    for path in files:
        fd = open_input(path)
        try:
            block = block_size(fd)
            if os.fstat(fd).st_size < block:
                continue
            with tempfile.TemporaryFile(dir=folder) as target:
                return block if clone_range(fd, 0, target.fileno(), 0, block) else None
        except OSError:
            # A full or read-only file system speaks for itself when the copy begins.
            return None
        finally:
            os.close(fd)
    return None


class Cloner:
    """Carries placements out, leaf by leaf. Safe to use from several threads.

    Args:
        reader: of the source's files.
        writer: of the target's files, which have their final sizes.
        strict: sharing that does not work is an error.
    """

    def __init__(self, reader: FileReader, writer: FileWriter, *, strict: bool = False) -> None:
        self._reader = reader
        self._writer = writer
        self._strict = strict
        self._refused: set[str] = set()

    def run(self, placements: Mapping[str, Placement], threads: int | None) -> frozenset[str]:
        """Names of the leaves that are in place afterwards; the others are to be copied.

        Raises:
            UsageError: `strict`, and a leaf could not be shared.
            StorageError: a system call failed for other reasons than that files cannot share blocks.
        """
        placed: set[str] = set()
        lock = threading.Lock()

        def act(item: tuple[str, Placement]) -> None:
            name, placement = item
            if self._place(placement):
                with lock:
                    placed.add(name)

        run_threads(iter(placements.items()), act, threads)
        return frozenset(placed)

    def _place(self, placement: Placement) -> bool:
        if not all(map(self._share, placement.shared)):
            return False
        for run in placement.copied:
            self._copy(run)
        return True

    def _share(self, run: Run) -> bool:
        # A file that refused once will do so again: thousands of tries would only cost time.
        if run.source in self._refused:
            return False
        source, target = self._reader.descriptor(run.source), self._writer.descriptor(run.target)
        with storage_errors("share blocks with", self._writer.root / run.target):
            if clone_range(source, run.source_position, target, run.target_position, run.nbytes):
                return True
        self._refused.add(run.source)
        if self._strict:
            raise cannot_share(self._reader.root / run.source, self._writer.root)
        return False

    def _copy(self, run: Run) -> None:
        for done in range(0, run.nbytes, WINDOW):
            data = scratch("window", min(WINDOW, run.nbytes - done))
            self._reader.read(run.source, run.source_position + done, data, ahead=False)
            self._writer.write(run.target, run.target_position + done, data)


def cannot_share(source: Path, destination: Path) -> UsageError:
    """What is said where blocks have to be shared and cannot."""
    return UsageError(
        f"{source} cannot share blocks with {destination}",
        hint="both have to be on one XFS, Btrfs or other file system that shares blocks; --reflink auto copies instead",
    )
