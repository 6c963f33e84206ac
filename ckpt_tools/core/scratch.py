"""Buffers that a thread reuses from call to call: fresh ones of this size cost more page faults than the work in them.

A slot names one use; a thread that asks for a slot again gets the same memory, so nothing may be kept in it.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_held = threading.local()


def mapped(nbytes: int) -> memoryview:
    """Fresh memory that goes back to the system at once when it is no longer used."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:nbytes]


class Room:
    """Bounds the bytes that threads hold together in large pieces.

    Args:
        most: bytes of room; a piece that is larger waits until it is alone.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, nbytes: int) -> Iterator[None]:
        """Holds `nbytes` bytes of the room, after waiting for them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + nbytes <= self._most)
            self._taken += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._taken -= nbytes
                self._changed.notify_all()


def scratch(slot: str, nbytes: int) -> memoryview:
    """`nbytes` bytes of this thread's buffer for a slot; the next call with the same slot takes them away."""
    buffers: dict[str, memoryview] = _held.__dict__.setdefault("buffers", {})
    found = buffers.get(slot)
    if found is None or len(found) < nbytes:
        buffers.pop(slot, None)
        found = buffers[slot] = mapped(nbytes)
    return found[:nbytes]
