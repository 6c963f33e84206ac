"""Nothing appears under a final name before it is whole: lock, staging directory, journal, sync, rename.

Beside an output `out` live, while a run is going on or was interrupted, `.out.ckpt-lock` (held with flock, so a dead
holder lets go by itself) and `.out.ckpt-staging` (the files so far and the journal). A rerun of the same plan goes on
where the journal ends; a rerun of another plan starts anew. On commit everything is synced and the directory is
renamed, journal and all; with `overwrite` the old output is exchanged for the new one in one step and only then
removed. The journal goes last: one in an output says that cleaning up is all that an interrupted run has left to do.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import xxhash

from ckpt_tools.core.errors import LockedError, OutputExistsError, StorageError, UsageError
from ckpt_tools.core.paths import is_there
from ckpt_tools.core.scratch import scratch
from ckpt_tools.core.storage import closing, make_directories, pwrite_all, storage_errors, sync_directory, write_file
from ckpt_tools.engine.execute import Outcome
from ckpt_tools.engine.files import FileReader
from ckpt_tools.engine.journal import JOURNAL, FileJournal, read_journal
from ckpt_tools.formats.hf import SideFile

_PIECE = 1 << 20
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Staging:
    """The private directory in which an output is made.

    Args:
        final: path that the output will have.
        overwrite: an existing output may be replaced.

    Attributes:
        final: the same, absolute.
        path: the private directory.

    Raises:
        OutputExistsError: the output exists and may not be replaced.
        LockedError: another run is making it.
    """

    def __init__(self, final: Path, *, overwrite: bool = False) -> None:
        self.final = Path(os.path.abspath(final))
        if not self.final.name:
            raise UsageError(f"the output {final} is the root of the file system", hint="give a directory in it")
        self.path = self.final.with_name(f".{self.final.name}.ckpt-staging")
        self._aside = self.final.with_name(f".{self.final.name}.ckpt-old")
        self._lock_path = self.final.with_name(f".{self.final.name}.ckpt-lock")
        self._overwrite = overwrite
        self._lock_fd = -1
        self._finished: tuple[bytes, dict[int, Outcome]] | None = None
        # What an interrupted run left is looked at, and cleaned up, under the lock.
        if not (is_there(self._lock_path) or is_there(self.final / JOURNAL)):
            self._check_final()
        with storage_errors("create", self.final.parent):
            make_directories(self.final.parent)

    def _check_final(self) -> None:
        with storage_errors("look at", self.final):
            if self.final.is_symlink():
                raise UsageError(f"the output {self.final} is a symbolic link", hint="give the path that it points to")
            if not self._overwrite and self.final.exists():
                after = " and is whole: a run that was interrupted had just completed it" if self._finished else ""
                raise OutputExistsError(f"{self.final} exists{after}", hint="choose another output, or add --overwrite")
            if self.final.exists() and not self.final.is_dir():
                raise UsageError(f"the output {self.final} is a file, not a directory")
            if self.final.is_mount():
                raise UsageError(f"the output {self.final} is a mount point", hint="give a directory in it")

    def __enter__(self) -> Staging:
        self._lock()
        try:
            self._recover()
            # The holder before us may have finished between our first look and the lock.
            self._check_final()
            with storage_errors("create", self.path):
                self.path.mkdir(exist_ok=True)
                status = os.lstat(self.path)
                if not S_ISDIR(status.st_mode):
                    raise UsageError(f"{self.path} is a symbolic link", hint="remove it; this tool did not make it")
                if status.st_uid != os.geteuid():
                    raise UsageError(f"{self.path} belongs to another user", hint="remove it, or choose another output")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            with closing(fd, self._lock_path), storage_errors("remove", self._lock_path):
                self._lock_path.unlink(missing_ok=True)

    def _lock(self) -> None:
        while True:
            with storage_errors("lock", self._lock_path):
                fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                with storage_errors("lock", self._lock_path):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # A holder removes the file before it lets go: a lock on a removed file holds off nobody.
                    if _same_file(self._lock_path, fd):
                        self._lock_fd = fd
                        return
            except StorageError as error:
                if isinstance(error.__cause__, BlockingIOError):
                    raise LockedError(f"another run is writing {self.final}", hint="wait for it to end") from None
                raise
            finally:
                if self._lock_fd != fd:
                    with storage_errors("close", self._lock_path):
                        os.close(fd)

    def _recover(self) -> None:
        """Completes the commit in which an earlier run was interrupted."""
        if is_there(self._aside) and not is_there(self.final):
            with storage_errors("restore", self.final):
                os.rename(self._aside, self.final)
                sync_directory(self.final.parent)
        with storage_errors("look at", self.final):
            if self.final.is_symlink() or not self.final.is_dir():
                return
        self._finished = read_journal(self.final / JOURNAL)
        if self._finished is not None:
            self._clean_up()

    def finished(self, fingerprint: str) -> Mapping[int, Outcome] | None:
        """Segments of the same plan whose output an interrupted run had put in place already; None where none had."""
        if self._finished is None or not self._finished[0].startswith(f"{fingerprint} ".encode()):
            return None
        return self._finished[1]

    def resume(self, fingerprint: str, files: Mapping[str, int] | None = None) -> FileJournal:
        """The journal of an interrupted run of the same plan, or a new one in an emptied directory.

        Args:
            fingerprint: of the plan.
            files: sizes by relative path; where one is not in place the journal does not count.
        """
        journal = FileJournal.go_on(self.path / JOURNAL, fingerprint)
        if journal is not None and all(_has_size(self.path / file, size) for file, size in (files or {}).items()):
            return journal
        if journal is not None:
            journal.close()
        self.restart()
        return FileJournal.begin(self.path / JOURNAL, fingerprint)

    def check_shared(self, key: bytes) -> None:
        """Raises `StorageError` unless this directory is that of the process whose journal begins with `key`."""
        found = read_journal(self.path / JOURNAL)
        if found is None or found[0] != key:
            raise StorageError(
                f"{self.path} is not the directory that rank 0 works in",
                hint="give an output on a file system that all ranks share, by the same path",
            )

    def restart(self) -> None:
        """Empties the directory: whatever an earlier run left there is not part of this output."""
        with storage_errors("empty", self.path):
            shutil.rmtree(self.path)
            self.path.mkdir()

    def forget(self) -> None:
        """Makes the next run start anew."""
        with storage_errors("remove", self.path / JOURNAL):
            (self.path / JOURNAL).unlink(missing_ok=True)

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Around syncs: after one that fails the next run starts anew.

        The system reports a write that it could not do once, and a second sync succeeds without it.
        """
        try:
            yield
        except StorageError:
            self.forget()
            raise

    def discard(self) -> None:
        """Removes what was made so far."""
        self.forget()
        shutil.rmtree(self.path, ignore_errors=True)

    def write_document(self, name: str, data: bytes) -> None:
        """A small file, written and synced."""
        path = self.path / name
        with self._new(path) as fd, storage_errors("write", path):
            pwrite_all(fd, data, 0)
            os.fsync(fd)

    def copy_document(self, name: str, source: SideFile) -> str:
        """A file copied byte for byte and synced, in pieces; returns the xxh3-128 of its bytes as hexadecimal text.

        Raises:
            InputChangedError: the source changed meanwhile.
        """
        path, digest, position = self.path / name, xxhash.xxh3_128(), 0
        with FileReader(source.root, shell=True) as reader, self._new(path) as fd:
            size = reader.size(source.name)
            while position < size:
                piece = scratch("document", min(_PIECE, size - position))
                reader.read(source.name, position, piece)
                digest.update(piece)
                with storage_errors("write", path):
                    pwrite_all(fd, piece, position)
                position += len(piece)
            with storage_errors("write", path):
                os.fsync(fd)
            reader.check_unchanged()
        return digest.hexdigest()

    @contextmanager
    def _new(self, path: Path) -> Iterator[int]:
        """A descriptor of a new file."""
        with storage_errors("create", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Never through a link that an earlier, hostile run left behind.
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with closing(fd, path):
            yield fd

    def commit(self) -> None:
        """Makes the output appear under its final name, whole and on the disk."""
        with self.syncing(), storage_errors("sync", self.path):
            for folder, _, _ in os.walk(self.path, onerror=_raise):
                sync_directory(Path(folder))
        with storage_errors("commit", self.final):
            if self.final.exists():
                self._exchange()
            else:
                os.rename(self.path, self.final)
            sync_directory(self.final.parent)
        self._clean_up()

    def _exchange(self) -> None:
        """Swaps two directories in one step; where the system cannot, the old one is moved aside first."""
        if _exchange_in_kernel(self.path, self.final):
            return
        if is_there(self._aside):
            raise StorageError(f"{self._aside} is in the way", hint="it is an older output of the same name; remove it")
        # Without a journal a run that is killed here could not tell the old output from a stranger's directory.
        if not is_there(self.path / JOURNAL):
            write_file(self.path / JOURNAL, b"\n")
            sync_directory(self.path)
        os.rename(self.final, self._aside)
        try:
            os.rename(self.path, self.final)
        except OSError:
            os.rename(self._aside, self.final)
            raise

    def _clean_up(self) -> None:
        """Removes what the output, which is in place, has replaced, and its journal last."""
        for old in (self.path, self._aside):
            if is_there(old):
                with storage_errors("remove the replaced output", old):
                    shutil.rmtree(old)
                    # On the disk before the journal goes: nobody would look for it afterwards.
                    sync_directory(old.parent)
        with storage_errors("remove", self.final / JOURNAL):
            if is_there(self.final / JOURNAL):
                os.unlink(self.final / JOURNAL)
                sync_directory(self.final)


def _raise(error: OSError) -> None:
    raise error


def _same_file(path: Path, fd: int) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


def _has_size(path: Path, size: int) -> bool:
    with storage_errors("look at", path):
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return False
    return S_ISREG(status.st_mode) and status.st_size == size


def _exchange_in_kernel(new: Path, old: Path) -> bool:
    """renameat2(2) with RENAME_EXCHANGE; False where the system or the file system does not have it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code))
    return False
