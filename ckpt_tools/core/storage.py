"""What failures of the operating system are called, and the calls on files and directories that several rooms make."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt_tools.core.errors import StorageError

_HINTS = {
    errno.ENOSPC: "free disk space and run the same command again: it resumes",
    errno.EDQUOT: "the disk quota is used up; free some and run the same command again: it resumes",
    errno.EIO: "the disk or the network file system failed; check it before anything else",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "the file system is mounted read-only",
}

_LOST = "what was written may be lost, so the same command starts anew; check the disk and the space on it first"
"""After a sync that failed: a second one would succeed without writing what the first could not."""

_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP)


@contextmanager
def storage_errors(action: str, *parts: Path | str) -> Iterator[None]:
    """Turns an `OSError` inside into a `StorageError` that names the action and the file, given as parts of a path.

    The file is that, or the one below it that the error speaks of.
    """
    try:
        yield
    except OSError as error:
        raise storage_error(action, Path(*parts), error) from error


def storage_error(action: str, path: Path, error: OSError) -> StorageError:
    """What `storage_errors` raises, for code that is called too often to enter a context."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    hint = _LOST if action == "sync" else _HINTS.get(error.errno or 0)
    named = str(error.filename)
    where = named if named.startswith(f"{path}{os.sep}") else path
    return StorageError(f"cannot {action} {where}: {reason}", hint=hint)


@contextmanager
def closing(fd: int, path: Path) -> Iterator[int]:
    """A descriptor that is closed at the end, with a failure to do so as a `StorageError`."""
    try:
        yield fd
    finally:
        with storage_errors("close", path):
            os.close(fd)


def pwrite_all(
    fd: int,
    data: bytes | memoryview,
    position: int,
    write: Callable[[int, memoryview, int], int] | None = None,
) -> None:
    """Writes all of `data` at byte `position`, however little of it a call of `write` takes; raises `OSError`."""
    rest = memoryview(data)
    while rest:
        count = (write or os.pwrite)(fd, rest, position)
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rest, position = rest[count:], position + count


def write_file(path: Path, data: bytes) -> None:
    """A new file with these bytes, not synced; raises `OSError`, also where there is something of that name."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        pwrite_all(fd, data, 0)
    finally:
        os.close(fd)


def nearest_directory(path: Path) -> Path:
    """The absolute path of a directory, or of the nearest one above it that exists; raises `StorageError`."""
    folder = path.absolute()
    with storage_errors("look at", folder):
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
    return folder


def sync_directory(path: Path) -> None:
    """Returns when the names in a directory are on the disk; raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems keep names by themselves and do not know this call.
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(fd)


def make_directories(path: Path) -> None:
    """The directory and those above it that are missing, each synced into the one above; raises `OSError`."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_directory(folder.parent)


def close_all(opened: Iterable[tuple[Callable[[], None], Path]]) -> None:
    """Calls every function, then raises the first failure as a `StorageError` that names its file."""
    failures: list[StorageError] = []
    for close, path in opened:
        try:
            with storage_errors("close", path):
                close()
        except StorageError as error:
            failures.append(error)
    if failures:
        raise failures[0]
