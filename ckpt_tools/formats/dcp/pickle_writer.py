"""Writes plain values and records as a pickle, protocol 2, without the pickle module and without torch.

The inverse of `pickle_reader`: what is a record here becomes a real object when torch reads the result. Protocol 2 is
what `torch.save` writes and what `torch.load(weights_only=True)` expects.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator

from ckpt_tools.formats.dcp.inert import NO_STATE, Global, Persistent, Record

_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}


def dumps(value: object, shared: Collection[Global] = ()) -> bytes:
    """The pickle of nested None, bool, int, float, str, tuple, list, dict, `Global`, `Record` and `Persistent`.

    An iterator of pairs stands for a dict that need not exist as a whole. Strings and globals that occur again are
    written as references.

    Args:
        value: to write.
        shared: kinds of records that are written as references, too, where the same object occurs again.

    Raises:
        TypeError: a value of another type.
    """
    writer = _Writer(shared)
    writer.save(value)
    return bytes(writer.out + b".")


class _Writer:
    __slots__ = ("memo", "out", "shared")

    def __init__(self, shared: Collection[Global]) -> None:
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[object, bytes] = {}
        self.shared = shared

    def save(self, value: object) -> None:
        out, kind = self.out, type(value)
        # By type and in the order of frequency: a .metadata file is a million values.
        if kind is str or kind is Global:
            reference = self.memo.get(value)
            if reference is None:
                self._save_new(value)
            else:
                out += reference
        elif kind is int:
            out += _integer(value)  # type: ignore[arg-type]
        elif isinstance(value, Record):
            self._save_record(value)
        elif isinstance(value, tuple):
            self._save_tuple(value)
        elif isinstance(value, dict):
            self._save_pairs(value.items())
        elif isinstance(value, list):
            out += b"]("
            for item in value:
                self.save(item)
            out += b"e"
        elif value is None:
            out += b"N"
        elif isinstance(value, bool):
            out += b"\x88" if value else b"\x89"
        elif isinstance(value, float):
            out += b"G" + struct.pack(">d", value)
        elif isinstance(value, Persistent):
            self.save(value.pid)
            out += b"Q"
        elif isinstance(value, Iterator):
            self._save_pairs(value)
        else:
            raise TypeError(f"a pickle of data cannot hold {kind.__name__}")

    def _save_pairs(self, pairs: Iterable[tuple[object, object]]) -> None:
        self.out += b"}("
        for key, item in pairs:
            self.save(key)
            self.save(item)
        self.out += b"u"

    def _save_new(self, value: object) -> None:
        if isinstance(value, Global):
            self.out += f"c{value.module}\n{value.name}\n".encode()
        else:
            text = str(value).encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(text)) + text
        self._remember(value)

    def _remember(self, value: object) -> None:
        """Writes that what was written last is `value`, to be referred to."""
        index = len(self.memo)
        short = index < 256
        self.out += struct.pack("<cB", b"q", index) if short else struct.pack("<cI", b"r", index)
        self.memo[value] = struct.pack("<cB", b"h", index) if short else struct.pack("<cI", b"j", index)

    def _save_record(self, value: Record) -> None:
        if (reference := self.memo.get(value)) is not None:
            self.out += reference
            return
        self.save(value.kind)
        self._save_tuple(value.args)
        self.out += b"\x81" if value.new else b"R"
        if value.state is not NO_STATE:
            self.save(value.state)
            self.out += b"b"
        if value.kind in self.shared:
            self._remember(value)

    def _save_tuple(self, value: tuple[object, ...]) -> None:
        if not value:
            self.out += b")"
            return
        code = _TUPLES.get(len(value))
        if code is None:
            self.out += b"("
        for item in value:
            self.save(item)
        self.out += code or b"t"


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return struct.pack("<cB", b"K", value)
    if 0 <= value < 65536:
        return struct.pack("<cH", b"M", value)
    if -(1 << 31) <= value < 1 << 31:
        return struct.pack("<ci", b"J", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return struct.pack("<cB", b"\x8a", len(data)) + data
