"""Reading and writing byte ranges of files, with every failure of the operating system turned into `StorageError`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from ckpt_tools.core.errors import InputChangedError, NotFoundError
from ckpt_tools.core.paths import open_input
from ckpt_tools.core.storage import close_all, pwrite_all, storage_error, storage_errors
from ckpt_tools.engine.ranges import RangeReader
from ckpt_tools.formats.remote import remote_files

READ_AHEAD = 8 << 20
"""Bytes asked of the disk ahead of what was read; more crowds out the writes (measured, docs/performance.md)."""

Identity = tuple[int, int, int]
"""Size, modification time in nanoseconds and inode: what differs when a file was changed or replaced."""

WRITE_BEHIND = sys.platform == "linux"
"""The one switch of writing behind (`RWF_DONTCACHE`); where kernel or file system lack it, plain writes take over."""

BEHIND = 256 << 10
"""Bytes from which a write goes to the disk at once: the work of the disk is then spread over the copy, and the memory
that it held is taken again for what follows (measured, docs/performance.md)."""

PAGE = 4096

_ADVISE = getattr(os, "posix_fadvise", None)
_DONTCACHE = 0x80
"""`RWF_DONTCACHE` of Linux 6.14, which Python 3.11 does not name."""

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FileReader:
    """Byte ranges of the files under a root, each opened once. Safe to use from several threads.

    The root may be the shell of a remote checkpoint; its bytes are then read from where they are.

    Files are read mostly forward: the kernel is asked for the next `READ_AHEAD` bytes in time, so that the disk works
    while threads copy. A source that changes is noticed: a file must be the one that was there before its header was
    read, or, for a file that nothing is known of, stay the one that was opened.

    Args:
        root: of the files.
        identities: of files as they were before their headers were read, by relative path.
        ahead: most of the files will be read.
        shell: read what lies here of a remote checkpoint, too: its small files are whole.
    """

    def __init__(
        self,
        root: Path,
        identities: Mapping[str, Identity] | None = None,
        *,
        ahead: bool = True,
        shell: bool = False,
    ) -> None:
        remote = None if shell else remote_files(root)
        self._root = root
        self._remote = None if remote is None else RangeReader(remote)
        self._ahead = ahead
        self._known = dict(identities or {})
        self._open: dict[str, tuple[int, Identity]] = {}
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
        fd, done = self.descriptor(file), 0
        try:
            while done < len(into):
                count = os.preadv(fd, [into[done:]], position + done)
                if count == 0:
                    rest = len(into) - done
                    raise InputChangedError(
                        f"{self._root / file} ends at byte {position + done:,}, {rest:,} bytes before a tensor does",
                        hint="the file was truncated after its header was read; fetch it again",
                    )
                done += count
        except OSError as error:
            raise storage_error("read", self._root / file, error) from error
        if self._ahead:
            self._read_ahead(file, fd, position + done)

    def expect(self, file: str, position: int, nbytes: int) -> None:
        """Asks the kernel for a range that will be read soon; the disk can then work on many at once."""
        if _ADVISE is not None:
            _ADVISE(self.descriptor(file), position, nbytes, os.POSIX_FADV_WILLNEED)

    def size(self, file: str) -> int:
        """Bytes of the file when it was opened."""
        self.descriptor(file)
        return self._open[file][1][0]

    def check_unchanged(self) -> None:
        """Raises `InputChangedError` when a file is no longer the one that was opened."""
        if self._remote is not None:
            self._remote.check_unchanged()
        for file, (_, before) in self._open.items():
            path = self._root / file
            check_identity(path, before, identity_of(path))

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
        opened, self._open = self._open, {}
        close_all((partial(os.close, fd), self._root / file) for file, (fd, _) in opened.items())

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
            path, before = self._root / file, self._known.get(file)
            with self._lock, storage_errors("open", path):
                found = self._open.get(file)
                if found is None:
                    try:
                        fd = open_input(path, self._root)
                    except NotFoundError:
                        check_identity(path, before, None)
                        raise
                    now = _identity(os.fstat(fd))
                    found = self._open[file] = (fd, before or now)
                    check_identity(path, found[1], now)
        return found[0]


def identity_of(path: Path) -> Identity | None:
    """Of the file that is at `path` now, None where there is none; raises `StorageError`."""
    with storage_errors("look at", path):
        try:
            return _identity(os.stat(path))
        except FileNotFoundError:
            return None


def _identity(status: os.stat_result) -> Identity:
    return status.st_size, status.st_mtime_ns, status.st_ino


def check_identity(path: Path, before: Identity | None, now: Identity | None) -> None:
    """Raises `InputChangedError` when a file, None for none, is no longer what it was."""
    if now != before:
        raise InputChangedError(
            f"{path} changed while it was being read; nothing was written under the final name",
            hint="stop whatever writes there and run the command again",
        )


def identities(folder: Path) -> dict[str, Identity]:
    """Of every regular file in a directory, links followed; raises `StorageError`."""
    found = {}
    with storage_errors("list", folder), os.scandir(folder) as entries:
        for entry in entries:
            # A stranger's temporary file may go at any time.
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file():
                    found[entry.name] = _identity(entry.stat())
    return found


class FileWriter:
    """Byte ranges of files that this run owns, under a root. Safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, int] = {}
        self._lock = threading.Lock()
        self._behind = WRITE_BEHIND

    @property
    def root(self) -> Path:
        return self._root

    def create(self, file: str, size: int, *, allocate: bool = True) -> None:
        """Makes `file` with `size` bytes, or opens the one of that size that an interrupted run left.

        Args:
            file: relative path.
            size: in bytes.
            allocate: take the space on the disk at once.
        """
        path = self._root / file
        with storage_errors("create", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = self.descriptor(file, os.O_CREAT)
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, 0)
                os.ftruncate(fd, size)
                if allocate:
                    _allocate(fd, size)

    def write(self, file: str, position: int, data: memoryview) -> None:
        """Writes all of `data` at byte `position` of `file`."""
        fd = self.descriptor(file)
        try:
            pwrite_all(fd, data, position, self._write_some)
        except OSError as error:
            raise storage_error("write", self._root / file, error) from error

    def _write_some(self, fd: int, data: memoryview, position: int) -> int:
        """Bytes written by one call. Whole pages of a large range start their way to the disk and are not kept."""
        if self._behind and len(data) >= BEHIND:
            if head := -position % PAGE:
                return os.pwrite(fd, data[:head], position)
            written = _write_behind(fd, data[: len(data) // PAGE * PAGE], position)
            if written is not None:
                return written
            self._behind = False
        return os.pwrite(fd, data, position)

    def sync(self) -> None:
        """Returns when everything written is on the disk."""
        for file, fd in list(self._open.items()):
            with storage_errors("sync", self._root / file):
                os.fsync(fd)

    def close(self) -> None:
        opened, self._open = self._open, {}
        close_all((partial(os.close, fd), self._root / file) for file, fd in opened.items())

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


def _write_behind(fd: int, pages: memoryview, position: int) -> int | None:
    """Bytes that one call wrote and that are on their way to the disk; None where this system has no such call."""
    try:
        return os.pwritev(fd, [pages], position, _DONTCACHE)
    except NotImplementedError:  # a C library without pwritev2
        return None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return None


def writes_behind(folder: Path) -> bool:
    """Whether files in a folder can be written behind; leaves nothing there. Raises `OSError` if none can be made."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return WRITE_BEHIND and _write_behind(file.fileno(), memoryview(bytes(PAGE)), 0) is not None


def _allocate(fd: int, size: int) -> None:
    """Takes the disk space of a file at once, where the file system can: in one piece, or not at all.

    A file that got none (or less, when a signal came between) takes its space as it is written.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    # `os.posix_fallocate` would write every block of a file system that cannot.
    if fallocate is not None and size and fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code not in (*_UNSUPPORTED, errno.EINTR):
            raise OSError(code, os.strerror(code))


class MemoryFiles:
    """Named buffers in place of files: parameters of a model that is loaded or saved."""

    def __init__(self, buffers: Iterable[tuple[str, memoryview]]) -> None:
        self._buffers = dict(buffers)

    def read(self, file: str, position: int, into: memoryview) -> None:
        into[:] = self._buffers[file][position : position + len(into)]

    def write(self, file: str, position: int, data: memoryview) -> None:
        self._buffers[file][position : position + len(data)] = data
