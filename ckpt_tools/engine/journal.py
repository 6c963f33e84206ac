"""Which segments of a run are done, on disk, so that a run that was killed goes on where it stopped.

A journal is a line that says which plan it belongs to and on which start of which machine it was written, followed by
one record of 25 bytes for each segment. It is synced only when all is done: after a kill the kernel still holds what
was written, and after a crash of the machine its boot id differs and the journal does not count.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import struct
import threading
from pathlib import Path

from ckpt_tools.core.storage import closing, pwrite_all, storage_errors, write_file
from ckpt_tools.engine.execute import Journal, Outcome
from ckpt_tools.formats.documents import pread_exact

JOURNAL = ".ckpt-journal"
_RECORD = struct.Struct("<Q?16s")


class FileJournal(Journal):
    """A journal that is written to a file. Safe to use from several threads.

    Attributes:
        key: its first line.
    """

    def __init__(self, path: Path, key: bytes, done: dict[int, Outcome]) -> None:
        super().__init__(done)
        self.key = key
        self._path = path
        self._lock = threading.Lock()
        # Half a record that a kill left is overwritten by the next one.
        self._end = len(key) + len(done) * _RECORD.size
        with storage_errors("open", path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    @classmethod
    def begin(cls, path: Path, fingerprint: str) -> FileJournal:
        """An empty journal of a plan, in a new file."""
        key = f"{fingerprint} {boot_mark()}\n".encode()
        with storage_errors("write", path):
            write_file(path, key)
        return cls(path, key, {})

    @classmethod
    def go_on(cls, path: Path, fingerprint: str) -> FileJournal | None:
        """The journal that an interrupted run of the same plan left since the machine was started, or None."""
        found = read_journal(path)
        if found is None or found[0] != f"{fingerprint} {boot_mark()}\n".encode():
            return None
        return cls(path, *found)

    def record(self, number: int, outcome: Outcome) -> None:
        record = _RECORD.pack(number, outcome.exact, outcome.digest)
        with self._lock, storage_errors("write", self._path):
            pwrite_all(self._fd, record, self._end)
            self._end += len(record)
        super().record(number, outcome)

    def sync(self) -> None:
        """Returns when every record is on the disk."""
        with storage_errors("sync", self._path):
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)

    def close(self) -> None:
        """Lets go of the file; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with storage_errors("close", self._path):
                os.close(fd)


def read_journal(path: Path) -> tuple[bytes, dict[int, Outcome]] | None:
    """First line and whole records of the journal at `path`, None where there is none; links and pipes are none.

    Raises:
        StorageError: it cannot be read.
    """
    with storage_errors("read", path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise
        with closing(fd, path):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            content = pread_exact(fd, os.fstat(fd).st_size, 0, path)
    first, _, records = content.partition(b"\n")
    whole = memoryview(records)[: len(records) - len(records) % _RECORD.size]
    return first + b"\n", {n: Outcome(digest, exact) for n, exact, digest in _RECORD.iter_unpack(whole)}


def boot_mark() -> str:
    """Identifies this machine since it was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        # Not Linux: nothing tells a killed process from a crashed machine, so an interrupted run starts anew.
        return secrets.token_hex(16)
