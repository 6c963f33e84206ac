"""Sharded safetensors: the files that torch's `HuggingFaceStorageWriter(save_distributed=True)` writes.

Each file holds one process's pieces of the tensors, and the entry `DCP_SHARDING_INFO` of its metadata says where each
piece belongs. torch records no shapes, so a missing last piece cannot be told from a smaller tensor by torch's files
alone; files planned here carry the shape as well, and then it can.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Final

from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.errors import FormatError, NotFoundError, UsageError, listed
from ckpt_tools.core.tensors import Chunk, ChunkResidues, Framing, Store, StoredTensor, TargetFiles
from ckpt_tools.formats.documents import parse_json_object
from ckpt_tools.formats.safetensors import SafetensorsHeader, plan_file, read_header
from ckpt_tools.formats.tiling import Box, check, find_fault

INFO: Final = "DCP_SHARDING_INFO"
_OFFSETS: Final = "saved_offsets"
_SHAPE: Final = "global_shape"
_VERSION: Final = {"DCP_VERSION": "1.0", "format": "pt"}
_SHARD_NAME: Final = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")

PlannedChunks = Sequence[tuple[tuple[int, ...], tuple[int, ...], str]]


@dataclass(slots=True)
class _Found:
    """The pieces of one tensor, collected over the files."""

    dtype: DType
    shape: tuple[int, ...] | None = None
    chunks: dict[Box, Chunk] = field(default_factory=dict)


def open_sharded(root: Path) -> Store:
    """The checkpoint in the directory `root`, from the headers of its files.

    Raises:
        NotFoundError: no safetensors file there.
        FormatError: a shard file or a piece is missing, pieces overlap or disagree, or a header is malformed.
    """
    names = sorted(n for n in os.listdir(root) if n.endswith(".safetensors")) if root.is_dir() else []
    if not names:
        raise NotFoundError(f"{root} holds no *.safetensors file")
    _check_file_names(root, names)
    headers = {name: read_header(root / name) for name in names}
    plain = [name for name, header in headers.items() if INFO not in header.metadata]
    if plain:
        raise FormatError(
            f"{root}: these files have no {INFO}, so they are not shards\n{listed(plain)}",
            hint="open the directory as a Hugging Face repository, or move these files out of it",
        )
    found: dict[str, _Found] = {}
    for name, header in headers.items():
        _collect(root / name, name, header, found)
    tensors = {name: _tensor(root, name, pieces) for name, pieces in found.items()}
    return Store(root, "sharded-safetensors", tensors, {name: header.size for name, header in headers.items()})


def is_sharded(root: Path) -> bool:
    """Whether the directory holds files named as torch names shards."""
    return root.is_dir() and any(map(_SHARD_NAME.fullmatch, os.listdir(root)))


def _check_file_names(root: Path, names: Sequence[str]) -> None:
    """Shards are numbered without gaps, and each of the N parts occurs."""
    matches = [match for name in names if (match := _SHARD_NAME.fullmatch(name))]
    if not matches:
        return
    shards = {int(match[1]) for match in matches}
    parts = {int(match[2]) for match in matches}
    counts = {int(match[3]) for match in matches}
    missing = [f"shard-{i:05d}-model-*" for i in range(1, max(shards)) if i not in shards]
    missing += [f"shard-*-model-{i:05d}" for i in range(1, min(max(counts), 100_000)) if i not in parts]
    if missing or len(counts) > 1:
        what = f"files are missing\n{listed(missing)}" if missing else f"files are of saves in {sorted(counts)} parts"
        raise FormatError(f"{root}: {what}", hint="copy the missing files again, or use another checkpoint")


def _collect(path: Path, file: str, header: SafetensorsHeader, found: dict[str, _Found]) -> None:
    info = parse_json_object(header.metadata[INFO], f"{path}: {INFO}")
    for name, entry in header.tensors.items():
        described = info.get(name)
        described = described if isinstance(described, dict) else {}
        offsets = _counts(described.get(_OFFSETS), len(entry.shape))
        shape = _counts(described[_SHAPE], len(entry.shape)) if _SHAPE in described else None
        if offsets is None or (_SHAPE in described and shape is None):
            raise FormatError(f"{path}: {INFO} does not say where the piece of {name!r} belongs")
        pieces = found.setdefault(name, _Found(entry.dtype, shape))
        if pieces.dtype is not entry.dtype or (pieces.shape and shape and pieces.shape != shape):
            raise FormatError(f"{path}: {name!r} has another dtype or shape than in other files")
        pieces.shape = pieces.shape or shape
        # Replicas of one piece, which several processes of a mesh may hold, are kept once.
        pieces.chunks.setdefault((offsets, entry.shape), Chunk(offsets, entry.shape, file, entry.position))


def _counts(value: object, dimensions: int) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) != dimensions:
        return None
    counts = tuple(n for n in value if type(n) is int and 0 <= n < 1 << 62)
    return counts if len(counts) == dimensions else None


def _tensor(root: Path, name: str, pieces: _Found) -> StoredTensor:
    dimensions = {len(sizes) for _, sizes in pieces.chunks}
    if len(dimensions) > 1:
        raise FormatError(f"{root}: the pieces of {name!r} have different numbers of dimensions")
    ends = [[o + s for o, s in zip(offsets, sizes, strict=True)] for offsets, sizes in pieces.chunks]
    shape = tuple(max(column) for column in zip(*ends, strict=True)) if pieces.shape is None else pieces.shape
    if prod(shape) >= 1 << 62:
        raise FormatError(f"{root}: {name!r} has an impossible number of elements: {list(shape)}")
    check(name, shape, list(pieces.chunks), str(root))
    full = tuple(chunk for chunk in pieces.chunks.values() if chunk.numel)
    return StoredTensor(name, pieces.dtype, shape, full)


def plan_sharded(
    tensors: Mapping[str, tuple[DType, tuple[int, ...], PlannedChunks]], residues: ChunkResidues | None = None
) -> TargetFiles:
    """The files of a new sharded checkpoint, readable by torch's `HuggingFaceStorageReader` and its consolidation.

    Args:
        tensors: by name: dtype, shape, and for each chunk its offsets, sizes and file.
        residues: position modulo 4 KiB that a chunk should have, by name and offsets.

    Raises:
        UsageError: chunks that do not tile their tensor, or two chunks of one tensor in one file, for which the
            format has no place.
    """
    files: dict[str, dict[str, tuple[DType, tuple[int, ...]]]] = {}
    info: dict[str, dict[str, dict[str, list[int]]]] = {}
    wanted: dict[str, dict[str, int]] = {}
    for name, (dtype, shape, planned) in tensors.items():
        if fault := find_fault(shape, [(offsets, sizes) for offsets, sizes, _ in planned]):
            raise UsageError(f"the chunks planned for {name!r} do not make up {list(shape)}: {fault}")
        for offsets, sizes, file in planned:
            members = files.setdefault(file, {})
            if name in members:
                raise UsageError(f"{file} cannot hold two chunks of {name!r}")
            members[name] = (dtype, tuple(sizes))
            if residues and (residue := residues.get((name, tuple(offsets)))) is not None:
                wanted.setdefault(file, {})[name] = residue
            info.setdefault(file, {})[name] = {_OFFSETS: list(offsets), _SHAPE: list(shape)}
    store = Store(Path(), "sharded-safetensors", {}, {})
    framing: list[Framing] = []
    positions: dict[str, dict[str, int]] = {}
    for file, members in files.items():
        metadata = {INFO: json.dumps(info[file], separators=(",", ":")), **_VERSION}
        header, positions[file], store.files[file] = plan_file(members, metadata, wanted.get(file))
        framing.append(Framing(file, 0, header))
    for name, (dtype, shape, planned) in tensors.items():
        chunks = tuple(Chunk(tuple(o), tuple(s), file, positions[file][name]) for o, s, file in planned)
        store.tensors[name] = StoredTensor(name, dtype, tuple(shape), chunks)
    return TargetFiles(store, tuple(framing), {})


def shard_file(shard: int) -> str:
    """The name that torch gives the file of shard `shard` (counted from 1) when each shard is one file."""
    return f"shard-{shard:05d}-model-00001-of-00001.safetensors"
