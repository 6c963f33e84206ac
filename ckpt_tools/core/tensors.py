"""What a checkpoint stores, whatever its file format: tensors, and the chunks of them that lie in files.

Every format reader returns a `Store`, every writer is planned as one, and the engine knows nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

from ckpt_tools.core.dtypes import DType

StoreKind = Literal["safetensors", "sharded-safetensors", "dcp", "memory"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor whose elements lie in one file.

    Attributes:
        offsets: first index of the box in the whole tensor, one number per dimension.
        sizes: extent of the box, one number per dimension.
        file: path relative to the store's root.
        position: byte position of the box's first element in that file.
        strides: elements between neighbours of each dimension in the file; None means row-major.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return prod(self.sizes)


ChunkResidues = Mapping[tuple[str, tuple[int, ...]], int]
"""By name of a tensor and offsets of a chunk: position in its file modulo 4 KiB, a multiple of 8."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A named tensor and where its elements lie."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.numel)


class Checksum(NamedTuple):
    """The CRC-32 that a file records of a part of itself."""

    tensor: str
    file: str
    position: int
    nbytes: int
    crc: int


@dataclass(slots=True)
class Store:
    """The tensors of one checkpoint, read from headers alone.

    Attributes:
        root: directory that the chunks' files are relative to.
        kind: format of the files.
        tensors: by name, in the order of the files.
        files: size in bytes of each file that holds tensor data, by relative path.
        skipped: entries that are not tensors of the model (optimizer state, byte blobs), by name, with the reason.
        metadata: free text that the format carries (`__metadata__` of the first safetensors file).
        nested: key of the saved state dict that all tensors are under, joined to their names; empty for none.
        checksums: of stored records, where the format has them.
    """

    root: Path
    kind: StoreKind
    tensors: dict[str, StoredTensor]
    files: dict[str, int]
    skipped: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    nested: str = ""
    checksums: tuple[Checksum, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor: the last dimension has stride 1."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * shape[i + 1]
    return tuple(strides)


@dataclass(frozen=True, slots=True)
class Framing:
    """Bytes of a file that are not tensor data: a header, a zip record, padding that is not zero."""

    file: str
    position: int
    data: bytes


@dataclass(slots=True)
class TargetFiles:
    """A checkpoint that is to be written: where every byte of every file comes from.

    Attributes:
        store: the tensors with the positions they will have; `store.files` holds the final sizes.
        framing: the bytes around the tensors. Together with the chunks they cover each file exactly,
            except for gaps that stay zero (`ftruncate` makes them).
        documents: whole small files by relative path (index, `.metadata`), written last.
    """

    store: Store
    framing: tuple[Framing, ...]
    documents: dict[str, bytes]
