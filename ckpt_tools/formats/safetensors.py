"""The safetensors container: a strict header reader, and the plan of a header for a new file.

Only the header is read or made here; tensor bytes are moved by the engine at the positions given.
Rules: https://huggingface.co/docs/safetensors (format), held more strictly than the reference library holds them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple, NoReturn

from ckpt_tools.core.dtypes import DTYPES, DType
from ckpt_tools.core.errors import FormatError, UsageError
from ckpt_tools.core.names import MAX_NAME_LENGTH, nearest
from ckpt_tools.core.paths import close_input, open_input
from ckpt_tools.formats.arrangement import ALIGNMENT, aligned_order, congruent_order
from ckpt_tools.formats.documents import check_density, first_repeated, pread_exact

MAX_HEADER_SIZE = 100_000_000  # the limit of the reference implementation
MAX_DIMENSIONS = 64  # the limit of torch
MAX_ELEMENTS = 1 << 62
MAX_ENTRIES = 1_000_000  # of one object; the largest published models have under 200,000 tensors in all files together
_METADATA = "__metadata__"


class TensorEntry(NamedTuple):
    """One tensor of a file: `position` is the absolute byte position of its first element."""

    dtype: DType
    shape: tuple[int, ...]
    position: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What the header of one file says.

    Attributes:
        tensors: by name, in the order of the header.
        metadata: the `__metadata__` strings.
        data_start: absolute position of the first data byte.
        size: size of the file in bytes.
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    size: int


class _Declared(NamedTuple):
    """A tensor as the JSON gives it, made while parsing so that a large header never exists as nested dicts."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, root: Path | None = None) -> SafetensorsHeader:
    """The checked header of a safetensors file in the directory `root`, by default its own.

    Raises:
        NotFoundError: no such file.
        FormatError: any rule of the format is broken; the message names the fault, the file and the tensor.
    """
    fd = open_input(path, root)
    try:
        size = os.fstat(fd).st_size
        if size < 8:
            raise FormatError(f"{path} is {size} bytes long, too short for a safetensors file")
        (length,) = struct.unpack("<Q", pread_exact(fd, 8, 0, path))
        if length > MAX_HEADER_SIZE:
            raise FormatError(
                f"{path} declares a header of {length:,} bytes; the limit is {MAX_HEADER_SIZE:,}",
                hint="the file is damaged or is not a safetensors file",
            )
        if 8 + length > size:
            raise FormatError(f"{path} is truncated: its header needs {8 + length:,} bytes and the file has {size:,}")
        raw = pread_exact(fd, length, 8, path)
    finally:
        close_input(fd, path)
    return _check(path, _parse(path, raw), 8 + length, size)


def _parse(path: Path, raw: bytes) -> dict[str, object]:
    if not raw.startswith(b"{"):
        raise FormatError(f"{path}: the header does not start with '{{'", hint="this is not a safetensors file")

    def reject(text: str) -> NoReturn:
        raise FormatError(f"{path}: the header holds the number {text[:40]}; only whole numbers are allowed")

    def whole(text: str) -> int:
        return reject(text) if text.startswith("-") else int(text)

    def collect(pairs: list[tuple[str, object]]) -> object:
        if (declared := _declared(pairs)) is not None:
            return declared
        if len(pairs) > MAX_ENTRIES:
            raise FormatError(f"{path}: the header holds {len(pairs):,} entries; the limit is {MAX_ENTRIES:,}")
        result = dict(pairs)
        if len(result) != len(pairs):
            raise FormatError(f"{path}: the header gives {first_repeated(pairs)[:80]!r} twice")
        return result

    try:
        text = raw.decode("utf-8")
        check_density(text, f"{path}: the header", is_header=True)
        # -0 would be taken for 0, which it is not in the format; a hook for every number costs half of the time.
        signed = whole if "-0" in text else None
        header = json.loads(
            text, object_pairs_hook=collect, parse_int=signed, parse_float=reject, parse_constant=reject
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is one tensor description, not an object of them")
    return header


def _declared(pairs: list[tuple[str, object]]) -> _Declared | None:
    """The compact form of `{"dtype", "shape", "data_offsets"}`, None for any other object."""
    if len(pairs) != 3:
        return None
    fields = dict(pairs)
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if type(dtype) is not str or type(shape) is not list or type(span) is not list or len(span) != 2:
        return None
    if len(shape) > MAX_DIMENSIONS:
        return None
    for number in (*shape, *span):
        if type(number) is not int or not 0 <= number <= MAX_ELEMENTS:
            return None
    return _Declared(dtype, tuple(shape), span[0], span[1])


def _check(path: Path, header: dict[str, object], data_start: int, size: int) -> SafetensorsHeader:
    metadata = _check_metadata(path, header.pop(_METADATA, {}))
    tensors: dict[str, TensorEntry] = {}
    for name, declared in header.items():
        if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise FormatError(f"{path}: {name[:80]!r} is not a usable tensor name")
        if not isinstance(declared, _Declared):
            raise FormatError(
                f"{path}: tensor {name!r} is not described by a dtype, a shape of at most {MAX_DIMENSIONS} whole "
                "numbers and two data_offsets, and nothing else"
            )
        tensors[name] = _check_tensor(path, name, declared, data_start)
    _check_tiling(path, tensors, data_start, size)
    return SafetensorsHeader(tensors, metadata, data_start, size)


def _check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings")
    try:
        "".join((*metadata, *metadata.values())).encode()
    except UnicodeEncodeError:
        raise FormatError(f"{path}: __metadata__ holds half of a character (a lone surrogate)") from None
    return metadata


def _check_tensor(path: Path, name: str, declared: _Declared, data_start: int) -> TensorEntry:
    dtype = DTYPES.get(declared.dtype)
    if dtype is None:
        close = nearest(declared.dtype[:32], DTYPES)
        raise FormatError(
            f"{path}: tensor {name!r} has the unknown dtype {declared.dtype[:32]!r}",
            hint=f"the nearest known one is {close}" if close else None,
        )
    numel = prod(declared.shape)
    # Empty tensors, too: readers multiply the sizes from the left and overflow before they reach the zero.
    if prod(n for n in declared.shape if n) > MAX_ELEMENTS:
        raise FormatError(f"{path}: tensor {name!r} has an impossible number of elements: {list(declared.shape)}")
    nbytes, rest = divmod(numel * dtype.bits, 8)
    span = declared.end - declared.begin
    if rest or nbytes != span:
        raise FormatError(
            f"{path}: tensor {name!r}, {dtype} of shape {list(declared.shape)}, needs "
            f"{numel * dtype.bits / 8:,g} bytes and its data_offsets span {span:,}"
        )
    return TensorEntry(dtype, declared.shape, data_start + declared.begin, nbytes)


def _check_tiling(path: Path, tensors: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Every data byte belongs to exactly one tensor."""
    position, previous = data_start, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].position, item[1].nbytes)):
        if entry.position != position:
            fault = "overlaps" if entry.position < position else "leaves a hole after"
            raise FormatError(
                f"{path}: tensor {name!r} {fault} {previous!r}: it starts at byte {entry.position:,} of the file, "
                f"expected {position:,}"
            )
        position, previous = position + entry.nbytes, name
    if position > size:
        raise FormatError(
            f"{path} is truncated: {size:,} bytes, and {previous!r} ends at byte {position:,}",
            hint="download or copy the file again",
        )
    if position < size:
        raise FormatError(f"{path} has {size - position:,} bytes after the last tensor")


def plan_file(
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]],
    metadata: Mapping[str, str],
    residues: Mapping[str, int] | None = None,
) -> tuple[bytes, dict[str, int], int]:
    """The header of a new file, and where its tensors go.

    Data starts on a 4 KiB boundary (the header is padded with spaces), and tensors are ordered so that those of whole
    blocks start on one, too. Where `residues` are given, data starts and tensors are ordered so that as many of them
    as possible lie at their residue.

    Args:
        tensors: dtype and shape by name.
        metadata: the `__metadata__` strings.
        residues: position modulo 4 KiB that a tensor should have, a multiple of 8.

    Returns:
        header bytes including the length field, absolute position of each tensor, size of the file.

    Raises:
        UsageError: a name that the format reserves or that a strict reader would refuse.
    """
    sizes = {name: dtype.nbytes(prod(shape)) for name, (dtype, shape) in tensors.items()}
    widths = {name: dtype.bits for name, (dtype, _) in tensors.items()}
    residue, order = congruent_order(sizes, widths, residues) if residues else (0, aligned_order(sizes, widths))
    header: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    relative: dict[str, int] = {}
    offset = 0
    for name in order:
        if name == _METADATA or not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise UsageError(f"{name[:80]!r} cannot be the name of a tensor in a safetensors file")
        dtype, shape = tensors[name]
        header[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [offset, offset + sizes[name]]}
        relative[name] = offset
        offset += sizes[name]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * ((residue - 8 - len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_SIZE:
        raise UsageError(f"{len(sizes):,} tensors need a header of {len(text):,} bytes; use smaller shards")
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + at for name, at in relative.items()}, start + offset
