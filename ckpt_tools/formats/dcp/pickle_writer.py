"""Writes plain values and records as a pickle, protocol 2, without the pickle module and without torch.

The inverse of `pickle_reader`: what is a record here becomes a real object when torch reads the result. Protocol 2 is
what `torch.save` writes and what `torch.load(weights_only=True)` expects.
"""

from __future__ import annotations

import struct

from ckpt_tools.formats.dcp.inert import NO_STATE, Global, Persistent, Record

_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}


def dumps(value: object) -> bytes:
    """The pickle of nested None, bool, int, float, str, tuple, list, dict, `Global`, `Record` and `Persistent`.

    Strings and globals that occur again are written as references.

    Raises:
        TypeError: a value of another type.
    """
    writer = _Writer()
    writer.save(value)
    return b"".join((b"\x80\x02", *writer.parts, b"."))


class _Writer:
    __slots__ = ("memo", "parts")

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.memo: dict[object, bytes] = {}

    def save(self, value: object) -> None:
        emit = self.parts.append
        kind = type(value)
        if kind is str or kind is Global:
            self._save_shared(value)
        elif isinstance(value, Record):
            self._save_record(value)
        elif value is None:
            emit(b"N")
        elif isinstance(value, bool):
            emit(b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            emit(_integer(value))
        elif isinstance(value, float):
            emit(b"G" + struct.pack(">d", value))
        elif isinstance(value, tuple):
            self._save_tuple(value)
        elif isinstance(value, list):
            emit(b"](")
            for item in value:
                self.save(item)
            emit(b"e")
        elif isinstance(value, dict):
            emit(b"}(")
            for key, item in value.items():
                self.save(key)
                self.save(item)
            emit(b"u")
        elif isinstance(value, Persistent):
            self.save(value.pid)
            emit(b"Q")
        else:
            raise TypeError(f"a pickle of data cannot hold {kind.__name__}")

    def _save_shared(self, value: object) -> None:
        if (reference := self.memo.get(value)) is not None:
            self.parts.append(reference)
            return
        if isinstance(value, Global):
            self.parts.append(f"c{value.module}\n{value.name}\n".encode())
        else:
            text = str(value).encode("utf-8", "surrogatepass")
            self.parts.append(b"X" + struct.pack("<I", len(text)) + text)
        index = len(self.memo)
        short = index < 256
        self.parts.append(struct.pack("<cB", b"q", index) if short else struct.pack("<cI", b"r", index))
        self.memo[value] = struct.pack("<cB", b"h", index) if short else struct.pack("<cI", b"j", index)

    def _save_record(self, value: Record) -> None:
        self._save_shared(value.kind)
        self._save_tuple(value.args)
        self.parts.append(b"\x81" if value.new else b"R")
        if value.state is not NO_STATE:
            self.save(value.state)
            self.parts.append(b"b")

    def _save_tuple(self, value: tuple[object, ...]) -> None:
        if not value:
            self.parts.append(b")")
            return
        code = _TUPLES.get(len(value))
        if code is None:
            self.parts.append(b"(")
        for item in value:
            self.save(item)
        self.parts.append(code or b"t")


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return struct.pack("<cB", b"K", value)
    if 0 <= value < 65536:
        return struct.pack("<cH", b"M", value)
    if -(1 << 31) <= value < 1 << 31:
        return struct.pack("<ci", b"J", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return struct.pack("<cB", b"\x8a", len(data)) + data
