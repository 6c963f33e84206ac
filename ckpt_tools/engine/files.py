"""Reading and writing byte ranges of files, with every failure of the operating system turned into `StorageError`."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_tools.core.errors import InputChangedError, StorageError
from ckpt_tools.core.paths import open_input
from ckpt_tools.engine.ranges import RangeReader
from ckpt_tools.formats.remote import remote_files

if TYPE_CHECKING:
    from collections.abc import Iterator

READ_AHEAD = 8 << 20
"""Bytes asked of the disk ahead of what was read; more crowds out the writes (measured, docs/performance.md)."""

_ADVISE = getattr(os, "posix_fadvise", None)

_HINTS = {
    errno.ENOSPC: "free disk space and run the same command again: it resumes",
    errno.EDQUOT: "the disk quota is used up; free some and run the same command again: it resumes",
    errno.EIO: "the disk or the network file system failed; check it before anything else",
    errno.EACCES: "check the permissions",
    errno.EROFS: "the file system is mounted read-only",
}


@contextmanager
def storage_errors(action: str, *parts: Path | str) -> Iterator[None]:
    """Turns an `OSError` inside into a `StorageError` that names the action and the file, given as parts of a path."""
    try:
        yield
    except OSError as error:
        path = Path(*parts)  # not before: joining paths would take longer than a small read
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(f"cannot {action} {path}: {reason}", hint=_HINTS.get(error.errno or 0)) from error


class FileReader:
    """Byte ranges of the files under a root, each opened once. Safe to use from several threads.

    The root may be the shell of a remote checkpoint; its bytes are then read from where they are.

    Files are read mostly forward: the kernel is asked for the next `READ_AHEAD` bytes in time, so that the disk works
    while threads copy. `check_unchanged` guards against a source that changes while it is read: it compares size,
    modification time and inode with those at opening.

    Args:
        root: directory of the files.
        ahead: most of the files will be read.
    """

    def __init__(self, root: Path, *, ahead: bool = True) -> None:
        remote = remote_files(root)
        self._root = root
        self._remote = None if remote is None else RangeReader(remote)
        self._ahead = ahead
        self._open: dict[str, tuple[int, tuple[int, int, int]]] = {}
        self._asked: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def root(self) -> Path:
        return self._root

    def read(self, file: str, position: int, into: memoryview) -> None:
        """Fills `into` from byte `position` of `file` on."""
        if self._remote is not None:
            self._remote.read(file, position, into)
            return
        fd = self.descriptor(file)
        with storage_errors("read", self._root, file):
            done = 0
            while done < len(into):
                count = os.preadv(fd, [into[done:]], position + done)
                if count == 0:
                    rest = len(into) - done
                    raise StorageError(
                        f"{self._root / file} ends at byte {position + done:,}, {rest:,} bytes before a tensor does",
                        hint="the file was truncated after it was opened; fetch it again",
                    )
                done += count
        if self._ahead:
            self._read_ahead(file, fd, position + done)

    def expect(self, file: str, position: int, nbytes: int) -> None:
        """Asks the kernel for a range that will be read soon; the disk can then work on many at once."""
        if _ADVISE is not None:
            _ADVISE(self.descriptor(file), position, nbytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raises `InputChangedError` when a file is no longer the one that was opened."""
        if self._remote is not None:
            self._remote.check_unchanged()
        for file, (_, before) in self._open.items():
            path = self._root / file
            with storage_errors("look at", path):
                now = _identity(os.stat(path))
            if now != before:
                raise InputChangedError(
                    f"{path} changed while it was being read; nothing was written under the final name",
                    hint="stop whatever writes there and run the command again",
                )

    def _read_ahead(self, file: str, fd: int, position: int) -> None:
        asked = self._asked.get(file, 0)
        # Threads may overtake each other here; the worst is a range asked for twice.
        if _ADVISE is not None and position + READ_AHEAD > asked:
            begin = max(asked, position)
            self._asked[file] = begin + READ_AHEAD
            _ADVISE(fd, begin, READ_AHEAD, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        if self._remote is not None:
            self._remote.close()
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def descriptor(self, file: str) -> int:
        """The open file, which stays the reader's to close. A remote one has none: `ValueError`."""
        if self._remote is not None:
            # The shell has a file of that name, in which tensors are holes.
            raise ValueError(f"{self._root / file} is remote and has no descriptor")
        found = self._open.get(file)
        if found is None:
            with self._lock, storage_errors("open", self._root / file):
                found = self._open.get(file)
                if found is None:
                    fd = open_input(self._root / file)
                    found = self._open[file] = (fd, _identity(os.fstat(fd)))
        return found[0]


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


class FileWriter:
    """Byte ranges of files that this run owns, under a root. Safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def root(self) -> Path:
        return self._root

    def create(self, file: str, size: int) -> None:
        """Makes `file` with `size` bytes of space, or opens the one of that size that an interrupted run left."""
        path = self._root / file
        with storage_errors("create", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = self.descriptor(file, os.O_CREAT)
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, 0)
                os.ftruncate(fd, size)

    def write(self, file: str, position: int, data: memoryview) -> None:
        """Writes all of `data` at byte `position` of `file`."""
        fd = self.descriptor(file)
        with storage_errors("write", self._root, file):
            done = 0
            while done < len(data):
                done += os.pwrite(fd, data[done:], position + done)

    def sync(self) -> None:
        """Returns when everything written is on the disk."""
        for file, fd in list(self._open.items()):
            with storage_errors("sync", self._root / file):
                os.fsync(fd)

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def descriptor(self, file: str, flags: int = 0) -> int:
        """The open file, which stays the writer's to close."""
        found = self._open.get(file)
        if found is None:
            with self._lock:
                found = self._open.get(file)
                if found is None:
                    # Not for reading, too: an NFS client would then fill up pages of which another machine writes a
                    # part, and write them back whole.
                    found = os.open(self._root / file, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)
                    self._open[file] = found
        return found


class MemoryFiles:
    """Named buffers in place of files: parameters of a model that is loaded or saved."""

    def __init__(self, buffers: Iterable[tuple[str, memoryview]]) -> None:
        self._buffers = dict(buffers)

    def read(self, file: str, position: int, into: memoryview) -> None:
        into[:] = self._buffers[file][position : position + len(into)]

    def write(self, file: str, position: int, data: memoryview) -> None:
        self._buffers[file][position : position + len(data)] = data
