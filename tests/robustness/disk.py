"""A disk that loses what was not synced: recorded calls are played on it, and its power is cut at any of them.

What a cut may leave is kept apart from what the system shows. A file's writes reach the disk one by one and by sectors,
in any order, until the file is synced; a directory's names reach it one by one in any order until the directory is
synced, a rename within one directory being one step (as every journaling file system has it). Names lead to files, so
a file that is synced in a directory that is not may be lost, and a name may lead to a file without its bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from tests.robustness.scenarios import Tree
from tests.robustness.shim import Call

SECTOR = 512

Survives = Callable[[], bool]
"""Asked for every change that was not synced: whether it is on the disk after the cut."""


@dataclass(eq=False)
class File:
    """Bytes, and the changes since the last sync: a position and data, or a new size and None."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    changes: list[tuple[int, bytes | None]] = field(default_factory=list)

    def change(self, position: int, data: bytes | None) -> None:
        self.changes.append((position, data))
        _apply(self.data, position, data)

    def sync(self) -> None:
        self.synced, self.changes = bytes(self.data), []

    def after_cut(self, survives: Survives) -> bytes:
        data = bytearray(self.synced)
        for position, change in self.changes:
            if change is None:
                if survives():
                    _apply(data, position, None)
                continue
            for start in range(0, len(change), SECTOR):
                if survives():
                    _apply(data, position + start, change[start : start + SECTOR])
        return bytes(data)


def _apply(content: bytearray, position: int, data: bytes | None) -> None:
    end = position if data is None else position + len(data)
    if len(content) < end:
        content.extend(bytes(end - len(content)))
    if data is None:
        del content[end:]
    else:
        content[position:end] = data


Entries = dict[str, "File | Directory"]


@dataclass(eq=False)
class Directory:
    """Names, and the changes since the last sync: each sets some names, or removes them where it says None."""

    names: Entries = field(default_factory=dict)
    synced: Entries = field(default_factory=dict)
    changes: list[Mapping[str, File | Directory | None]] = field(default_factory=list)

    def change(self, **names: File | Directory | None) -> None:
        self.changes.append(names)
        _rename(self.names, names)

    def sync(self) -> None:
        self.synced, self.changes = dict(self.names), []

    def after_cut(self, survives: Survives) -> Entries:
        names = dict(self.synced)
        for change in self.changes:
            if survives():
                _rename(names, change)
        return names


def _rename(names: Entries, change: Mapping[str, File | Directory | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """Plays calls.

    Args:
        root: directory that the calls are about; other paths are left alone.
        content: what lies in it, all of it synced.
    """

    def __init__(self, root: PurePath, content: Tree) -> None:
        self._root = root
        self._top = Directory()
        self._open: dict[int, File | Directory] = {}
        for name, data in sorted(content.items()):
            parent, leaf = self._parent(root / name)
            parent.change(**{leaf: Directory() if data is None else File(bytearray(data), data)})
        self._sync_all(self._top)

    def play(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if not call.failed and all(PurePath(path).is_relative_to(self._root) for path in call.paths):
                _PLAYERS.get(call.name, Disk._unknown)(self, call)

    def content(self) -> Tree:
        """What the system shows."""
        return dict(_walk(self._top, "", lambda: True))

    def after_cut(self, survives: Survives) -> Tree:
        """What the disk holds after the power was cut."""
        return dict(_walk(self._top, "", survives, cut=True))

    def _sync_all(self, folder: Directory) -> None:
        folder.sync()
        for node in folder.names.values():
            if isinstance(node, Directory):
                self._sync_all(node)

    def _parent(self, path: PurePath) -> tuple[Directory, str]:
        folder = self._top
        *above, name = path.relative_to(self._root).parts
        for part in above:
            found = folder.names[part]
            assert isinstance(found, Directory)
            folder = found
        return folder, name

    def _node(self, path: PurePath) -> File | Directory:
        if path == self._root:
            return self._top
        parent, name = self._parent(path)
        return parent.names[name]

    def _unknown(self, call: Call) -> None:
        raise AssertionError(f"the disk does not know {call.name}")

    def _create(self, call: Call) -> None:
        parent, name = self._parent(PurePath(call.paths[0]))
        if name not in parent.names:
            parent.change(**{name: File()})
        elif call.arguments[1] & os.O_TRUNC:
            self._file(parent.names[name]).change(0, None)
        self._open[call.arguments[-1]] = parent.names[name]

    def _opened(self, call: Call) -> None:
        self._open[call.arguments[-1]] = self._node(PurePath(call.paths[0]))

    def _close(self, call: Call) -> None:
        self._open.pop(call.arguments[0], None)

    def _flock(self, call: Call) -> None:
        """Changes nothing that lasts."""

    def _pwrite(self, call: Call) -> None:
        fd, data, position = call.arguments
        self._file(self._open[fd]).change(position, data)

    def _pwritev(self, call: Call) -> None:
        fd, pieces, position, *_ = call.arguments
        self._file(self._open[fd]).change(position, b"".join(pieces))

    def _clone(self, call: Call) -> None:
        fd, position, data = call.arguments[-1]
        self._file(self._open[fd]).change(position, data)

    def _ftruncate(self, call: Call) -> None:
        fd, size = call.arguments
        self._file(self._open[fd]).change(size, None)

    def _fsync(self, call: Call) -> None:
        self._open[call.arguments[0]].sync()

    def _mkdir(self, call: Call) -> None:
        parent, name = self._parent(PurePath(call.paths[0]))
        parent.change(**{name: Directory()})

    def _unlink(self, call: Call) -> None:
        parent, name = self._parent(PurePath(call.paths[0]))
        parent.change(**{name: None})

    _rmdir = _unlink

    def _rename(self, call: Call) -> None:
        (parent, old), (other, new) = (self._parent(PurePath(path)) for path in call.paths)
        assert parent is other, "a rename between directories is not one step after a crash"
        parent.change(**{new: parent.names[old], old: None})

    def _exchange(self, call: Call) -> None:
        (parent, old), (other, new) = (self._parent(PurePath(path)) for path in call.paths)
        assert parent is other, "an exchange between directories is not one step after a crash"
        parent.change(**{new: parent.names[old], old: parent.names[new]})

    @staticmethod
    def _file(node: File | Directory) -> File:
        assert isinstance(node, File)
        return node


def _walk(folder: Directory, prefix: str, survives: Survives, *, cut: bool = False) -> list[tuple[str, bytes | None]]:
    found: list[tuple[str, bytes | None]] = []
    for name, node in (folder.after_cut(survives) if cut else folder.names).items():
        if isinstance(node, Directory):
            found += [(f"{prefix}{name}", None), *_walk(node, f"{prefix}{name}/", survives, cut=cut)]
        else:
            found.append((f"{prefix}{name}", node.after_cut(survives) if cut else bytes(node.data)))
    return found


_PLAYERS: dict[str, Callable[[Disk, Call], None]] = {
    "create": Disk._create,
    "open": Disk._opened,
    "close": Disk._close,
    "flock": Disk._flock,
    "pwrite": Disk._pwrite,
    "pwritev": Disk._pwritev,
    "clone": Disk._clone,
    "ftruncate": Disk._ftruncate,
    "fsync": Disk._fsync,
    "mkdir": Disk._mkdir,
    "unlink": Disk._unlink,
    "rmdir": Disk._rmdir,
    "rename": Disk._rename,
    "replace": Disk._rename,
    "exchange": Disk._exchange,
}
"""What a call does. A function that the engine begins to use is added here, or the tests say that it is missing."""
