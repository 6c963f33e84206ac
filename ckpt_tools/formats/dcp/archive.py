"""The part of the zip format that `torch.save` uses: stored entries, zip64, no comment, no encryption.

Positions are relative to the archive's first byte. Field layout: PKWARE APPNOTE 6.3, sections 4.3.7 to 4.3.16.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Final, NamedTuple, NoReturn
from zlib import crc32

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_END64: Final = struct.Struct("<4sQ2H2I4Q")
_LOCATOR: Final = struct.Struct("<4sIQI")
_END: Final = struct.Struct("<4s4H2IH")
_U32: Final = 0xFFFFFFFF
_MAX_DIRECTORY: Final = 1 << 16  # torch writes seven entries for one tensor
_VERSION: Final = 45  # the first with zip64
_DATE: Final = 33  # 1980-01-01, the format's zero
_PAD_ID: Final = 0x4246  # "FB", the extra field that torch pads with
_DESCRIPTORS: Final = (16, 24)  # bytes of a data descriptor, between the data and the next record, zip64 or not
_ENCRYPTED: Final = 0x2041  # flags 0 (encrypted), 6 (strong), 13 (masked headers)

MIN_SIZE: Final = _END.size

Read = Callable[[int, int], bytes]
Fail = Callable[[str], NoReturn]


class Entry(NamedTuple):
    """A directory entry: `header` is the position of the local header, `limit` that of what follows the entry, and
    `crc` the CRC-32 of its bytes, or 0 where none was computed."""

    name: bytes
    header: int
    size: int
    limit: int
    crc: int


class Stored(NamedTuple):
    """The bytes of an entry, and their CRC-32 or 0."""

    position: int
    size: int
    crc: int


def read_directory(read: Read, length: int, fail: Fail) -> dict[str, Entry]:
    """The entries of the archive that fills `length` bytes, by name without the leading folder.

    Args:
        read: `read(position, count)` gives bytes of the archive.
        length: size of the archive.
        fail: raises for a fault.
    """
    signature, *_, size, offset, comment = _END.unpack(read(length - _END.size, _END.size))
    limit = length - _END.size
    if signature != b"PK\x05\x06" or comment:
        fail("there is no archive directory at its end; the file is truncated or compressed as a whole")
    if _U32 in (size, offset):
        size, offset, limit = _read_end64(read, limit, fail)
    if size > _MAX_DIRECTORY or offset + size > limit:
        fail("the archive directory is out of bounds")
    directory = read(offset, size)
    entries: dict[str, Entry] = {}
    position = 0
    while position < size:
        if position + _CENTRAL.size > size or directory[position : position + 4] != b"PK\x01\x02":
            fail("the archive directory is damaged")
        name, entry, position = _read_central(directory, position, offset, fail)
        if name in entries:
            fail(f"the archive holds {name!r} twice")
        entries[name] = entry
    starts = sorted(entry.header for entry in entries.values())
    ends = dict(pairwise((*starts, offset)))
    return {name: entry._replace(limit=ends[entry.header]) for name, entry in entries.items()}


def _read_end64(read: Read, end: int, fail: Fail) -> tuple[int, int, int]:
    """Size and offset of a directory beyond 4 GiB, and the position where it must end."""
    at = end - _LOCATOR.size
    if at < 0:
        fail("the archive directory is damaged")
    signature, _, record, _ = _LOCATOR.unpack(read(at, _LOCATOR.size))
    if signature != b"PK\x06\x07" or record + _END64.size > at:
        fail("the archive directory is damaged")
    signature, *_, size, offset = _END64.unpack(read(record, _END64.size))
    if signature != b"PK\x06\x06":
        fail("the archive directory is damaged")
    return size, offset, record


def _read_central(directory: bytes, position: int, limit: int, fail: Fail) -> tuple[str, Entry, int]:
    fields = _CENTRAL.unpack_from(directory, position)
    flags, method = fields[3], fields[4]
    compressed, size, name_length, extra_length, comment_length = fields[8:13]
    header = fields[16]
    start = position + _CENTRAL.size
    end = start + name_length + extra_length + comment_length
    if end > len(directory):
        fail("the archive directory is damaged")
    raw = directory[start : start + name_length]
    if _U32 in (compressed, size, header):
        extra = directory[start + name_length : start + name_length + extra_length]
        size, compressed, header = _read_extra64(extra, (size, compressed, header), fail)
    if method or flags & _ENCRYPTED or compressed != size:
        fail(f"{raw!r} is compressed or encrypted")
    _, slash, name = raw.partition(b"/")
    if not slash:
        fail(f"{raw!r} is not inside the archive's folder")
    return name.decode("utf-8", "backslashreplace"), Entry(raw, header, size, limit, fields[7]), end


def _read_extra64(extra: bytes, values: tuple[int, int, int], fail: Fail) -> tuple[int, int, int]:
    """The 64-bit values of those among size, compressed size and header position that are saturated."""
    at = 0
    while at + 4 <= len(extra):
        kind, count = struct.unpack_from("<2H", extra, at)
        if kind == 1 and at + 4 + count <= len(extra):
            wide = iter(struct.unpack_from(f"<{count // 8}Q", extra, at + 4))
            found = [next(wide, None) if value == _U32 else value for value in values]
            size, compressed, header = found
            if size is not None and compressed is not None and header is not None:
                return size, compressed, header
        at += 4 + count
    return fail("a record beyond 4 GiB has no zip64 field")


def find_data(entry: Entry, read: Read, fail: Fail) -> Stored:
    """Where the bytes of an entry are, by its local header."""
    if entry.header + _LOCAL.size > entry.limit:
        fail(f"{entry.name!r} is out of bounds")
    signature, _, _, method, *_, name_length, extra_length = _LOCAL.unpack(read(entry.header, _LOCAL.size))
    position = entry.header + _LOCAL.size + name_length + extra_length
    if signature != b"PK\x03\x04" or method or name_length != len(entry.name):
        fail(f"the header of {entry.name!r} is damaged")
    # One wrong bit in the length of the padding would shift the data: an entry ends where the next record begins.
    rest = entry.limit - position - entry.size
    described = rest in _DESCRIPTORS and read(position + entry.size, 4) == b"PK\x07\x08"
    if (rest and not described) or read(entry.header + _LOCAL.size, name_length) != entry.name:
        fail(f"{entry.name!r} is out of bounds or has another name in its header")
    return Stored(position, entry.size, entry.crc)


def small_entry(name: str, data: bytes) -> tuple[bytes, bytes]:
    """Local header with data, and the directory record with its position left to `join`."""
    raw, crc = name.encode(), crc32(data)
    local = _LOCAL.pack(b"PK\x03\x04", _VERSION, 0, 0, 0, _DATE, crc, len(data), len(data), len(raw), 0)
    return local + raw + data, _central(raw, crc, len(data), 0)


def join(entries: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, list[bytes]]:
    """The local parts of small entries one after another, and their directory records with positions."""
    local, central = b"", []
    for part, record in entries:
        central.append(record[: _CENTRAL.size - 4] + struct.pack("<I", len(local)) + record[_CENTRAL.size :])
        local += part
    return local, central


def large_entry(
    name: str, size: int, header: int, start: int, alignment: int, residue: int
) -> tuple[bytes, int, bytes]:
    """Local header of `size` bytes that the caller supplies, zeros to follow it for their alignment, directory record.

    Args:
        name: of the entry.
        size: bytes of data; at 4 GiB and more both sizes move to a zip64 field.
        header: position of the local header in the archive.
        start: position of the archive in its file.
        alignment: a number below 64 KiB, the largest size of the padding.
        residue: position of the data in the file, modulo `alignment`.
    """
    raw = name.encode()
    wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= _U32 else b""
    end = start + header + _LOCAL.size + len(raw) + len(wide) + 4
    pad = (residue - end) % alignment
    extra = wide + struct.pack("<2H", _PAD_ID, pad)
    short = min(size, _U32)
    local = _LOCAL.pack(b"PK\x03\x04", _VERSION, 0, 0, 0, _DATE, 0, short, short, len(raw), len(extra) + pad)
    return local + raw + extra, pad, _central(raw, 0, size, header)


def _central(raw: bytes, crc: int, size: int, header: int) -> bytes:
    extra = struct.pack("<2H2Q", 1, 16, size, size) if size >= _U32 else b""
    short = min(size, _U32)
    fields = (_VERSION, _VERSION, 0, 0, 0, _DATE, crc, short, short, len(raw), len(extra), 0, 0, 0, 0, header)
    return _CENTRAL.pack(b"PK\x01\x02", *fields) + raw + extra


def directory(records: list[bytes], position: int) -> bytes:
    """The end of an archive: directory and both end records, zip64 first as torch writes them."""
    central = b"".join(records)
    count, size = len(records), len(central)
    end64 = _END64.pack(b"PK\x06\x06", _END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, size, position)
    locator = _LOCATOR.pack(b"PK\x06\x07", 0, position + size, 1)
    end = _END.pack(b"PK\x05\x06", 0, 0, count, count, size, min(position, _U32), 0)
    return central + end64 + locator + end
