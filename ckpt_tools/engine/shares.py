"""How several processes divide one plan: whether it is the same in all, which tasks are whose, and which are done."""

from __future__ import annotations

import base64
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Protocol, TypeVar

from ckpt_tools.engine.execute import Journal, Outcome, Task
from ckpt_tools.engine.files import FileWriter
from ckpt_tools.engine.plan import Plan
from ckpt_tools.engine.rendezvous import Message
from ckpt_tools.formats.remote import remote_files
from ckpt_tools.version import TOOL


def agreement(plan: Plan) -> str:
    """Identifies what a plan reads and writes: the same on all machines, wherever and whenever files were put there."""
    source, target = plan.source.store, plan.target.store
    state = sha256(repr((TOOL, plan.side, sorted(source.files.items()), sorted(target.files.items()))).encode())
    remote = remote_files(plan.source.root)
    state.update(repr(remote and (remote.url, remote.versions)).encode())
    for copy in plan.copies:
        ends = [(end.dtype.name, end.itemsize, *end.first()) for end in (copy.source, copy.target) if end is not None]
        state.update(repr((copy.name, copy.items, ends)).encode())
    return state.hexdigest()


class Sized(Protocol):
    """A piece of work, by its bytes."""

    @property
    def nbytes(self) -> int: ...


W = TypeVar("W", bound=Sized)


def share_of(works: Sequence[W], rank: int, world: int) -> list[W]:
    """Consecutive pieces with one of `world` equal parts of the bytes; each piece is in one rank's share."""
    total = sum(map(_weight, works))
    low, high = total * rank // world, total * (rank + 1) // world
    mine, position = [], 0
    for work in works:
        if low <= position + _weight(work) // 2 < high:
            mine.append(work)
        position += _weight(work)
    return mine


def _weight(work: Sized) -> int:
    return max(1, work.nbytes)


def packed(tasks: Sequence[Task]) -> str:
    """The tasks' numbers: one bit each, compressed, as text."""
    bits = bytearray(1 + max((task.number for task in tasks), default=0) // 8)
    for task in tasks:
        bits[task.number // 8] |= 1 << task.number % 8
    return base64.b64encode(zlib.compress(bits)).decode()


def unpacked(text: str) -> set[int]:
    bits = zlib.decompress(base64.b64decode(text))
    return {8 * place + bit for place, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1}


class RemoteJournal(Journal):
    """Reports segments to the first process.

    After a kill the kernel still holds what was written, so a segment counts at once on the first process's machine,
    whose boot id the journal begins with. Of another machine nobody could tell later whether it has crashed since:
    there a segment counts once it is synced.
    """

    def __init__(self, send: Callable[[Message], None], writer: FileWriter, sync_seconds: float) -> None:
        super().__init__()
        self._send = send
        self._writer = writer
        self._sync_seconds = sync_seconds
        self._synced_at = time.monotonic()
        self._written: list[tuple[int, bool, str]] = []
        self._lock = threading.Lock()

    def record(self, number: int, outcome: Outcome) -> None:
        with self._lock:
            self._written.append((number, outcome.exact, outcome.digest.hex()))
            if time.monotonic() < self._synced_at + self._sync_seconds:
                return
            self._synced_at = time.monotonic()
            written, self._written = self._written, []
        if self._sync_seconds:
            self._writer.sync()
        self._send({"done": written})

    def close(self) -> None:
        """Syncs and reports what is left."""
        self._writer.sync()
        if self._written:
            self._send({"done": self._written})
