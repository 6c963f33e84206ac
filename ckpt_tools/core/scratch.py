"""Buffers that a thread reuses from call to call: fresh ones of this size cost more page faults than the work in them.

A slot names one use; a thread that asks for a slot again gets the same memory, so nothing may be kept in it.
"""

from __future__ import annotations

import threading

_held = threading.local()


def scratch(slot: str, nbytes: int) -> memoryview:
    """`nbytes` bytes of this thread's buffer for a slot; the next call with the same slot takes them away."""
    buffers: dict[str, memoryview] = _held.__dict__.setdefault("buffers", {})
    found = buffers.get(slot)
    if found is None or len(found) < nbytes:
        found = buffers[slot] = memoryview(bytearray(nbytes))
    return found[:nbytes]
