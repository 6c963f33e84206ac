"""Puts tensors into place by sharing disk blocks: `FICLONERANGE`, as XFS, Btrfs and others have it.

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
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.paths import open_input
from ckpt_tools.core.scratch import scratch
from ckpt_tools.core.storage import closing, nearest_directory, storage_errors
from ckpt_tools.engine.execute import WINDOW
from ckpt_tools.engine.files import FileReader, FileWriter
from ckpt_tools.engine.sharing import Run, Sharing
from ckpt_tools.formats.remote import place, remote_files

Reflink = Literal["auto", "never", "always"]
"""Share blocks where that works, never, or refuse where it does not."""

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


def shareable_block(root: Path, files: Iterable[str], folder: Path) -> int | None:
    """Bytes of a block if the first of a root's files that has one can share it with a new file in a folder, else None.

    Leaves nothing behind. A folder that does not exist yet stands for its nearest parent that does. Files of a remote
    root are nowhere here to be shared.
    """
    if remote_files(root) is not None:
        return None
    folder = nearest_directory(folder)
    for file in files:
        with storage_errors("open", root, file), closing(open_input(root / file, root), root / file) as source:
            block = block_size(source)
            if os.fstat(source).st_size >= block:
                return block if _is_shared(source, folder, block) else None
    return None


def shares_blocks(folder: Path) -> bool:
    """Whether two new files in a folder can share a block; leaves nothing. Raises `OSError` if none can be made."""
    with tempfile.TemporaryFile(dir=folder) as source:
        block = block_size(source.fileno())
        source.write(bytes(block))
        source.flush()
        return _is_shared(source.fileno(), folder, block)


def _is_shared(source: int, folder: Path, block: int) -> bool:
    """Whether a file that has a block shares it with a new one in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder) as target:
            return clone_range(source, 0, target.fileno(), 0, block)
    except OSError:
        # A full or read-only file system speaks for itself when the copy begins.
        return False


def block_for(reflink: Reflink, root: Path, files: Iterable[str], destination: Path) -> int | None:
    """Bytes of the blocks that a source and an output share, None where they cannot or shall not.

    Args:
        reflink: what is asked for.
        root: directory of the source.
        files: of the source, by relative path.
        destination: directory that will be made.

    Raises:
        UsageError: sharing is asked for and not possible.
    """
    block = None if reflink == "never" else shareable_block(root, files, destination.absolute().parent)
    if block is None and reflink == "always":
        raise cannot_share(place(root), destination)
    return block


def share(sharing: Sharing, reader: FileReader, writer: FileWriter, *, strict: bool = False) -> frozenset[str]:
    """Puts the leaves of a plan into place, one system call a run. Doing it again does no harm.

    Args:
        sharing: the plan.
        reader: of the source's files.
        writer: of the target's files, which have their final sizes.
        strict: sharing that does not work is an error.

    Returns:
        files of the source that cannot share their blocks after all; what lies in them is to be copied.

    Raises:
        UsageError: `strict`, and there is such a file.
        StorageError: a system call failed for another reason.
    """
    if remote_files(reader.root) is not None:
        # What lies here of a remote source has holes in place of tensors.
        if strict:
            raise cannot_share(place(reader.root), writer.root)
        return frozenset(run.source for run in (*sharing.shared, *sharing.copied))
    for run in sharing.copied:
        reader.expect(run.source, run.source_position, run.nbytes)
    refused: set[str] = set()
    for run in sharing.shared:
        if run.source not in refused and not _share(run, reader, writer):
            refused.add(run.source)
            if strict:
                raise cannot_share(reader.root / run.source, writer.root)
    for run in sharing.copied:
        if run.source not in refused:
            _copy(run, reader, writer)
    return frozenset(refused)


def _share(run: Run, reader: FileReader, writer: FileWriter) -> bool:
    source, target = reader.descriptor(run.source), writer.descriptor(run.target)
    with storage_errors("share blocks with", writer.root, run.target):
        return clone_range(source, run.source_position, target, run.target_position, run.nbytes)


def _copy(run: Run, reader: FileReader, writer: FileWriter) -> None:
    for done in range(0, run.nbytes, WINDOW):
        data = scratch("window", min(WINDOW, run.nbytes - done))
        reader.read(run.source, run.source_position + done, data)
        writer.write(run.target, run.target_position + done, data)


def cannot_share(source: Path | str, destination: Path) -> UsageError:
    """What is said where blocks have to be shared and cannot."""
    return UsageError(
        f"{source} cannot share blocks with {destination}",
        hint="both have to be on one XFS, Btrfs or other file system that shares blocks; --reflink auto copies instead",
    )
