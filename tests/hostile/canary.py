"""A folder outside of a checkpoint that tells when anything in it is opened or changed, whoever does it and however.

The kernel reports it (inotify), so the test does not depend on which call of which library would have done it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OPENED_OR_CHANGED = 0x02 | 0x04 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200  # MODIFY ATTRIB OPEN MOVED CREATE DELETE
_IS_FOLDER = 0x40000000
_EVENT = struct.Struct("iIII")


@contextmanager
def untouched(folder: Path, only: str | None = None) -> Iterator[None]:
    """Fails when a file in `folder`, or the one called `only`, is opened, made, changed or removed meanwhile.

    Looking at names is allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(folder), _OPENED_OR_CHANGED) < 0:
        raise OSError(ctypes.get_errno(), "inotify")
    try:
        yield
        try:
            events = os.read(fd, 1 << 16)
        except BlockingIOError:
            events = b""
    finally:
        os.close(fd)
    at, touched = 0, []
    while at < len(events):
        _, mask, _, length = _EVENT.unpack_from(events, at)
        name = events[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0").decode()
        at += _EVENT.size + length
        if not mask & _IS_FOLDER and only in (None, name):
            touched.append(f"{name} ({mask:#x})")
    assert not touched, f"touched outside of the checkpoint: {touched}"
