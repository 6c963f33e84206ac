"""Small JSON documents of a checkpoint (config, index), read with a size bound and without duplicate keys."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ckpt_tools.core.errors import FormatError, StorageError
from ckpt_tools.core.paths import close_input, open_input

MAX_DOCUMENT_SIZE = 128 << 20


def read_whole(path: Path, limit: int) -> bytes:
    """All bytes of a regular file that is at most `limit` bytes long.

    Raises:
        NotFoundError: no such file.
        FormatError: not a regular file, or longer than `limit`.
        StorageError: the read failed.
    """
    fd = open_input(path)
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


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object in a file, with unique keys at every level.

    Raises:
        FormatError: not UTF-8, not JSON, not an object, or a key given twice.
    """
    return parse_json_object(read_whole(path, MAX_DOCUMENT_SIZE), str(path))


def parse_json_object(data: bytes | str, source: str) -> dict[str, object]:
    """The JSON object in `data`; `source` names it in messages."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise FormatError(f"{source} gives the key {twice!r} twice")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{source} holds a JSON {type(value).__name__}, not an object")
    return value
