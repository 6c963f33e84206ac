"""Small JSON documents of a checkpoint (config, index, manifest), read with bounds and without duplicate keys.

The bounds keep a hostile document from costing more memory than an honest one of its size: a megabyte of `[],[],...`
would become 25.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ckpt_tools.core.errors import FormatError, StorageError
from ckpt_tools.core.paths import close_input, open_input

MAX_DOCUMENT_SIZE: Final = 128 << 20
MAX_DEPTH: Final = 64
"""Nested objects and arrays of a document; what walks a config recurses as deep."""
_SLACK: Final = 1 << 19
_LONE_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


def read_whole(path: Path, limit: int, root: Path | None = None) -> bytes:
    """All bytes of a regular file that is at most `limit` bytes long and lies in `root` (by default its directory).

    Raises:
        NotFoundError: no such file.
        FormatError: not a regular file, a link out of `root`, or longer than `limit`.
        StorageError: the read failed.
    """
    fd = open_input(path, root)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise FormatError(f"{path} is {size:,} bytes long; the limit for this kind of file is {limit:,}")
        return pread_exact(fd, size, 0, path)
    finally:
        close_input(fd, path)


def pread_exact(fd: int, length: int, position: int, path: Path) -> bytes:
    """`length` bytes at `position`; `FormatError` when the file ends earlier, `StorageError` when the read fails."""
    parts: list[bytes] = []
    try:
        while length > 0 and (part := os.pread(fd, length, position)):
            parts.append(part)
            position += len(part)
            length -= len(part)
    except OSError as error:
        raise StorageError(f"{path} cannot be read at byte {position:,}: {error.strerror}") from error
    if length > 0:
        raise FormatError(f"{path} ends at byte {position:,}, {length:,} bytes too early")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_json_object(path: Path, root: Path | None = None) -> dict[str, object]:
    """The JSON object in a file, with unique keys at every level.

    Raises:
        FormatError: not UTF-8, not JSON, not an object, a key given twice, or nested or filled beyond reason.
    """
    return parse_json_object(read_whole(path, MAX_DOCUMENT_SIZE, root), str(path))


def parse_json_object(data: bytes | str, source: str) -> dict[str, object]:
    """The JSON object in `data`; `source` names it in messages."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise FormatError(f"{source} gives the key {first_repeated(pairs)[:80]!r} twice")
        return result

    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        check_density(text, source)
        value = json.loads(text, object_pairs_hook=unique)
        if _LONE_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{source} holds a JSON {type(value).__name__}, not an object")
    _check_depth(value, source)
    return value


def check_density(text: str, source: str, *, is_header: bool = False) -> None:
    """Refuses JSON with far more values for its size than any document of a checkpoint has.

    The densest honest ones are a safetensors header of empty tensors with short names, which has 3 brackets, 5 commas
    and 10 quotes in 48 bytes, and an index of names of one letter: 4 quotes in 24 bytes.

    Args:
        text: the document.
        source: its name for the message.
        is_header: it is a safetensors header.

    Raises:
        FormatError: it has more.
    """
    brackets, quotes = text.count("[") + text.count("{"), text.count('"')
    strings = max(4 * quotes, (quotes - 4 * brackets) * 12) if is_header else 6 * quotes
    if max(12 * brackets, 6 * text.count(","), strings) > len(text) + _SLACK:
        raise FormatError(f"{source} holds more JSON values than a document of its {len(text):,} bytes can need")


def first_repeated(pairs: list[tuple[str, object]]) -> str:
    """The first key that occurs again; empty when none does."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return ""


def _check_depth(document: dict[str, object], source: str) -> None:
    level: list[object] = [document]
    for _ in range(MAX_DEPTH):
        level = [value for container in level for value in _values(container) if isinstance(value, dict | list)]
        if not level:
            return
    raise FormatError(f"{source} nests objects and arrays more than {MAX_DEPTH} deep")


def _values(container: object) -> Iterable[object]:
    if isinstance(container, dict):
        return container.values()
    return container if isinstance(container, list) else ()
