"""Nothing appears under a final name before it is whole: lock, staging directory, journal, sync, rename.

Beside an output `out` live, while a run is going on or was interrupted, `.out.ckpt-lock` (held with flock, so a dead
holder lets go by itself) and `.out.ckpt-staging` (the files so far and the journal). A rerun of the same plan goes on
where the journal ends; a rerun of another plan starts anew. On commit everything is synced and the directory is
renamed; with `overwrite` the old output is exchanged for the new one in one step and only then removed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import struct
from pathlib import Path

from ckpt_tools.core.errors import LockedError, OutputExistsError, StorageError, UsageError
from ckpt_tools.engine.execute import Journal, Outcome
from ckpt_tools.engine.files import storage_errors

JOURNAL = ".ckpt-journal"
_RECORD = struct.Struct("<Q?16s")
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Staging:
    """The private directory in which an output is made.

    Args:
        final: path that the output will have.
        overwrite: an existing output may be replaced.

    Raises:
        OutputExistsError: the output exists and may not be replaced.
        LockedError: another run is making it.
    """

    def __init__(self, final: Path, *, overwrite: bool = False) -> None:
        self.final = Path(os.path.abspath(final))
        self.path = self.final.with_name(f".{self.final.name}.ckpt-staging")
        self._lock_path = self.final.with_name(f".{self.final.name}.ckpt-lock")
        self._overwrite = overwrite
        self._lock_fd = -1
        self._check_final()
        with storage_errors("create", self.final.parent):
            self.final.parent.mkdir(parents=True, exist_ok=True)

    def _check_final(self) -> None:
        if self.final.is_symlink():
            raise UsageError(f"the output {self.final} is a symbolic link", hint="give the path that it points to")
        if not self._overwrite and self.final.exists():
            raise OutputExistsError(f"{self.final} exists", hint="choose another output, or add --overwrite")
        if self.final.exists() and not self.final.is_dir():
            raise UsageError(f"the output {self.final} is a file, not a directory")

    def __enter__(self) -> Staging:
        self._lock()
        try:
            # The holder before us may have finished between our first look and the lock.
            self._check_final()
            with storage_errors("create", self.path):
                self.path.mkdir(exist_ok=True)
                if self.path.is_symlink():
                    raise UsageError(f"{self.path} is a symbolic link", hint="remove it; this tool did not make it")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock_fd >= 0:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _lock(self) -> None:
        while True:
            with storage_errors("lock", self._lock_path):
                fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise LockedError(f"another run is writing {self.final}", hint="wait for it to end") from None
            # A holder removes the file before it lets go: a lock on a removed file holds off nobody, so try again.
            try:
                if os.stat(self._lock_path).st_ino == os.fstat(fd).st_ino:
                    self._lock_fd = fd
                    return
            except FileNotFoundError:
                pass
            os.close(fd)

    def resume(self, fingerprint: str) -> FileJournal:
        """The journal of an interrupted run of the same plan, or a new one in an emptied directory."""
        key = fingerprint.encode() + boot_mark()
        path = self.path / JOURNAL
        with storage_errors("read", path):
            content = path.read_bytes() if path.exists() else b""
        if content.startswith(key):
            records = content[len(key) :]
            whole = len(records) - len(records) % _RECORD.size
            done = {n: Outcome(digest, exact) for n, exact, digest in _RECORD.iter_unpack(records[:whole])}
            return FileJournal(path, key, done, len(key) + whole)
        self.restart()
        with storage_errors("write", path):
            path.write_bytes(key)
        return FileJournal(path, key, {}, len(key))

    def check_shared(self, key: bytes) -> None:
        """Raises `StorageError` unless this directory is that of the process whose journal begins with `key`."""
        path = self.path / JOURNAL
        with storage_errors("read", path):
            found = path.read_bytes()[: len(key)] if path.exists() else b""
        if found != key:
            raise StorageError(
                f"{self.path} is not the directory that rank 0 works in",
                hint="give an output on a file system that all ranks share, by the same path",
            )

    def restart(self) -> None:
        """Empties the directory: whatever an earlier run left there is not part of this output."""
        with storage_errors("empty", self.path):
            shutil.rmtree(self.path)
            self.path.mkdir()

    def write_document(self, name: str, data: bytes) -> None:
        """A small file, written and synced."""
        path = self.path / name
        with storage_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Never through a link that an earlier, hostile run left behind.
            path.unlink(missing_ok=True)
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def commit(self) -> None:
        """Makes the output appear under its final name, whole and on the disk."""
        with storage_errors("commit", self.final):
            (self.path / JOURNAL).unlink(missing_ok=True)
            for folder in (*(p for p in self.path.rglob("*") if p.is_dir()), self.path):
                _sync_directory(folder)
            if self.final.exists():
                _exchange(self.path, self.final)
                _sync_directory(self.final.parent)
                shutil.rmtree(self.path)
            else:
                os.rename(self.path, self.final)
            _sync_directory(self.final.parent)

    def discard(self) -> None:
        """Removes what was made so far."""
        shutil.rmtree(self.path, ignore_errors=True)


class FileJournal(Journal):
    """A journal on disk. One record of 25 bytes a segment, appended in one write, so a kill leaves whole records.

    It is not synced: after a kill the kernel still holds what was written, and after a crash of the machine the boot
    id differs and the journal does not count. `key` is what the file begins with.
    """

    def __init__(self, path: Path, key: bytes, done: dict[int, Outcome], size: int) -> None:
        super().__init__(done)
        self.key = key
        self._path = path
        with storage_errors("write", path):
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            os.ftruncate(self._fd, size)

    def record(self, number: int, outcome: Outcome) -> None:
        with storage_errors("write", self._path):
            os.write(self._fd, _RECORD.pack(number, outcome.exact, outcome.digest))
        super().record(number, outcome)

    def close(self) -> None:
        os.close(self._fd)


def boot_mark() -> bytes:
    """How the first line of a journal ends: identifies this machine since it was started."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        # Not Linux: nothing tells a killed process from a crashed machine, so an interrupted run starts anew.
        boot_id = secrets.token_hex(16)
    return f" {boot_id}\n".encode()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two directories in one step; where the system cannot, the old one is moved aside first."""
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code))
    aside = old.with_name(f".{old.name}.ckpt-old")
    if aside.exists():
        raise StorageError(f"{aside} is in the way", hint="it is an older output of the same name; remove it")
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)
