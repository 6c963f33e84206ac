"""Stands between the engine and the operating system: every call that it makes can be counted, cut short or failed.

The functions of `os` and `fcntl` that the engine calls are replaced for as long as a `Shim` is entered, in all threads.
Calls are numbered from 1 in the order in which they are made; a `Hook` decides what becomes of each. The engine must
reach files through these functions only: what goes another way (`open`, `mmap`, a compiled extension) would not be
seen. `test_power.py` guards that: it rebuilds an output from the recorded calls alone and compares it with the real.

- `Recorder` writes every call down (for numbering them, and for `disk.py`, which plays them again on a disk that loses
  what was not synced);
- `Killer` ends the process before, after or in the middle of one call;
- `Faults` lets calls fail, or do only a part of what they are asked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ckpt_tools.engine import staging

When = Literal["before", "middle", "after"]
Real = Callable[..., Any]

CHANGES = (
    *("write", "pwrite", "pwritev", "ftruncate", "truncate", "posix_fallocate", "copy_file_range", "sendfile"),
    *("fsync", "fdatasync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "symlink", "link"),
)
"""Functions of `os` that change files or make changes last. `open` is one when it creates."""

LOOKS = ("read", "pread", "preadv", "stat", "lstat", "fstat", "scandir", "listdir", "close")
"""Functions of `os` that change nothing and can fail."""

TRANSFERS = ("write", "pwrite", "pwritev", "read", "pread", "preadv")
"""Functions that may do less than they are asked."""

FICLONERANGE = 0x4020940D


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        name: of the function; `exchange` for renameat2, `open` or `create` for `os.open`, `clone` for FICLONERANGE.
        paths: absolute paths that it is about, those of descriptors as they are now.
        arguments: as given.
        keywords: as given.
        failed: whether it did nothing and raised `OSError`, as removing what is not there does.
    """

    name: str
    paths: tuple[str, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any] = field(default_factory=dict)
    failed: bool = False

    @property
    def changes(self) -> bool:
        return self.name in CHANGES or self.name in ("create", "exchange", "clone", "flock")


class Hook(Protocol):
    """What becomes of a call: `real` with its arguments does it."""

    def __call__(self, call: Call, real: Real) -> Any: ...


class Shim:
    """Replaces the functions while it is entered."""

    def __init__(self, hook: Hook) -> None:
        self._hook = hook
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Shim:
        for name in (*CHANGES, *LOOKS, "open"):
            if hasattr(os, name):
                self._replace(os, name)
        self._replace(fcntl, "ioctl")
        self._replace(fcntl, "flock")
        self._replace(staging, "_exchange_in_kernel")
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, function in reversed(self._before):
            setattr(module, name, function)
        self._before.clear()

    def _replace(self, module: Any, name: str) -> None:
        real = getattr(module, name)
        self._before.append((module, name, real))

        def instead(*arguments: Any, **keywords: Any) -> Any:
            return self._hook(described(name, arguments, keywords), real)

        setattr(module, name, instead)


_fstat, _pread, _readlink = os.fstat, os.pread, os.readlink


def described(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Call:
    """The call with its real name and the paths that it is about."""
    if name == "_exchange_in_kernel":
        return Call("exchange", tuple(map(os.fspath, arguments)), arguments)
    if name == "open" and arguments[1] & os.O_TMPFILE == os.O_TMPFILE:
        return Call("attempt", (), arguments, keywords)
    if name == "open":
        name = "create" if arguments[1] & (os.O_CREAT | os.O_TRUNC) else "open"
    if name == "ioctl" and arguments[1] == FICLONERANGE:
        name = "clone"
    count = 2 if name in ("rename", "replace", "link", "symlink", "copy_file_range", "sendfile") else 1
    folder = keywords.get("dir_fd")
    paths = tuple(_place(a, folder) for a in arguments[:count])
    if name == "clone" and paths[0].endswith(" (deleted)"):
        # Of a file that never had a name: whether blocks can be shared is tried on one.
        return Call("attempt", (), arguments, keywords)
    return Call(name, paths, arguments, keywords)


def _place(target: Any, folder: int | None) -> str:
    if isinstance(target, int):
        return _readlink(f"/proc/self/fd/{target}")
    base = os.getcwd() if folder is None else _readlink(f"/proc/self/fd/{folder}")
    return os.path.normpath(os.path.join(base, os.fspath(target)))


class Recorder:
    """Does every call and writes down those that change something, with the bytes that they wrote.

    Attributes:
        calls: in order.
        syncs: whether syncs are really done; they cost time and matter only when the machine crashes.
    """

    def __init__(self, *, syncs: bool = False) -> None:
        self.calls: list[Call] = []
        self._syncs = syncs
        self._lock = threading.Lock()

    def __call__(self, call: Call, real: Real) -> Any:
        with self._lock:
            try:
                result = perform(call, real, syncs=self._syncs)
            except OSError:
                self.calls.append(replace(call, failed=True))
                raise
            if call.changes or call.name in ("open", "close"):
                self.calls.append(_with_result(call, result))
            return result

    @property
    def changes(self) -> list[Call]:
        return [call for call in self.calls if call.changes]


def _with_result(call: Call, result: Any) -> Call:
    """The call as a player needs it: data copied, descriptors named, what was really done."""
    arguments = call.arguments
    if call.name in ("pwrite", "write"):
        arguments = (arguments[0], bytes(memoryview(arguments[1])[:result]), *arguments[2:])
    if call.name in ("create", "open"):
        arguments = (*arguments, result)
    if call.name == "clone":
        # What it made of the target: descriptor, position and bytes.
        source, start, nbytes, position = struct.unpack("=qQQQ", arguments[2])
        arguments = (*arguments, (arguments[0], position, _pread(source, nbytes, start)))
    # renameat2 says that way that the file system does not have it.
    return replace(call, arguments=arguments, failed=result is False)


def perform(call: Call, real: Real, *, syncs: bool = False) -> Any:
    """Does the call; a sync only when asked."""
    if call.name in ("fsync", "fdatasync") and not syncs:
        _fstat(call.arguments[0])
        return None
    return real(*call.arguments, **call.keywords)


class Killer:
    """Ends this process, as SIGKILL does, around one of the calls that change something.

    Args:
        number: of the call, from 1.
        when: in the middle of a write means that half of it is done.
    """

    def __init__(self, number: int, when: When) -> None:
        self._left = number
        self._when = when
        self._lock = threading.Lock()

    def __call__(self, call: Call, real: Real) -> Any:
        if not call.changes:
            return real(*call.arguments, **call.keywords)
        with self._lock:
            self._left -= 1
            if self._left or self._when == "after":
                result = perform(call, real)
            if self._left:
                return result
            if self._when == "middle":
                fd, data, *rest = call.arguments
                real(fd, memoryview(data)[: len(data) // 2], *rest)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("a killed process went on")


Effect = Callable[[Call, Real], Any]


class Faults:
    """Lets chosen calls fail.

    Args:
        effect: what such a call does instead.
        chosen: which calls are numbered at all.
        numbers: which of these, from 1; None for all.

    Attributes:
        hit: those that failed.
        seen: how many were numbered.
    """

    def __init__(self, effect: Effect, chosen: Callable[[Call], bool], numbers: Sequence[int] | None = None) -> None:
        self._effect = effect
        self._chosen = chosen
        self._numbers = None if numbers is None else frozenset(numbers)
        self._lock = threading.Lock()
        self.seen = 0
        self.hit: list[Call] = []

    def __call__(self, call: Call, real: Real) -> Any:
        if self._chosen(call):
            with self._lock:
                self.seen += 1
                struck = self._numbers is None or self.seen in self._numbers
                if struck:
                    self.hit.append(call)
            if struck:
                return self._effect(call, real)
        return perform(call, real)


def failing(code: int) -> Effect:
    """The call raises `OSError`. A close that fails has closed all the same."""

    def effect(call: Call, real: Real) -> Any:
        if call.name == "close":
            real(*call.arguments)
        if call.arguments and isinstance(call.arguments[0], int):
            raise OSError(code, os.strerror(code))
        raise OSError(code, os.strerror(code), os.fspath(call.arguments[0]))

    return effect


def short(call: Call, real: Real) -> Any:
    """A read or write does a third of what it is asked, at least one byte."""
    fd, data, *rest = call.arguments
    if call.name in ("read", "pread"):
        return real(fd, max(1, data // 3), *rest)
    if call.name in ("preadv", "pwritev"):
        return real(fd, [_third(data[0])], *rest)
    return real(fd, _third(data), *rest)


def _third(data: Any) -> memoryview:
    return memoryview(data)[: max(1, len(data) // 3)]


def nothing_written(_call: Call, _real: Real) -> int:
    """A write that takes no byte and reports no error."""
    return 0


def under(folder: Path) -> Callable[[Call], bool]:
    """Calls about something below a directory; the interpreter's own are left alone."""
    prefix = f"{folder}{os.sep}"
    return lambda call: any(path.startswith(prefix) for path in call.paths)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
