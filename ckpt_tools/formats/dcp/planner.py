"""Plans a DCP checkpoint: aligned archives one after another in each `.distcp` file, and the `.metadata` document.

Plain `torch.distributed.checkpoint.load` reads the result into any mesh; torch is not needed to write it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.tensors import Chunk, ChunkResidues, Framing, Store, StoredTensor, TargetFiles
from ckpt_tools.formats.dcp.blob import frame
from ckpt_tools.formats.dcp.description import (
    CHUNK,
    INDEX,
    LAYOUT,
    MEMORY_FORMAT,
    METADATA,
    PROPERTIES,
    STORAGE_INFO,
    STORAGE_META,
    TENSOR,
)
from ckpt_tools.formats.dcp.inert import SIZE, Global, Record
from ckpt_tools.formats.dcp.metadata import METADATA_FILE
from ckpt_tools.formats.dcp.pickle_writer import dumps
from ckpt_tools.formats.tiling import find_fault

VERSION: Final = "1.0.0"

PlannedChunks = Sequence[tuple[tuple[int, ...], tuple[int, ...], str]]


def plan_dcp(
    tensors: Mapping[str, tuple[DType, tuple[int, ...], PlannedChunks]], residues: ChunkResidues | None = None
) -> TargetFiles:
    """The files of a new checkpoint.

    Args:
        tensors: by name: dtype, shape, and for each chunk its offsets, sizes and file. Chunks go into their file in
            the order given.
        residues: position modulo 4 KiB that a chunk is to have, by name and offsets; 0 where none is given.

    Returns:
        files whose tensors start on 4 KiB boundaries, or at their residue, and the `.metadata` document. The root of
        the store is the empty path.

    Raises:
        UsageError: chunks that do not tile their tensor, or an element type that torch has not.
    """
    residues = residues or {}
    store = Store(Path(), "dcp", {}, {})
    framing: list[Framing] = []
    described: dict[object, object] = {}
    stored: dict[object, object] = {}
    ends: dict[str, int] = {}
    for name, (dtype, shape, planned) in tensors.items():
        if fault := find_fault(shape, [(offsets, sizes) for offsets, sizes, _ in planned]):
            raise UsageError(f"the chunks planned for {name!r} do not make up {list(shape)}: {fault}")
        chunks = []
        for number, (offsets, sizes, file) in enumerate(planned):
            start = ends.get(file, 0)
            around = frame(dtype, sizes, start, residues.get((name, tuple(offsets)), 0))
            # Trailing zeros stay a hole: thousands of paddings would cost more memory than the plan.
            framing.append(Framing(file, start, around.prefix.rstrip(b"\0")))
            framing.append(Framing(file, around.end - len(around.suffix), around.suffix))
            ends[file] = around.end
            chunks.append(Chunk(tuple(offsets), tuple(sizes), file, around.data_position))
            place = {"relative_path": file, "offset": start, "length": around.end - start}
            stored[_index(name, offsets, number)] = Record(STORAGE_INFO, state=place, new=True)
        store.tensors[name] = StoredTensor(name, dtype, tuple(shape), tuple(chunks))
        described[name] = _describe(store.tensors[name])
    store.files = ends
    return TargetFiles(store, tuple(framing), {METADATA_FILE: dumps(_document(described, stored))})


def _size(numbers: Sequence[int]) -> Record:
    return Record(SIZE, (tuple(numbers),))


def _index(name: str, offsets: Sequence[int], number: int) -> Record:
    return Record(INDEX, state={"fqn": name, "index": number, "offset": _size(offsets)}, new=True)


def _describe(tensor: StoredTensor) -> Record:
    layout = Record(LAYOUT, ("torch.strided",))
    contiguous = Record(MEMORY_FORMAT, (0,))
    properties = (Global("torch", str(tensor.dtype.torch_name)), layout, False, contiguous, False)
    chunks = [
        Record(CHUNK, state={"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)}, new=True)
        for chunk in tensor.chunks
    ]
    state = {
        "properties": Record(PROPERTIES, state=properties, new=True),
        "size": _size(tensor.shape),
        "chunks": chunks,
    }
    return Record(TENSOR, state=state, new=True)


def _document(described: dict[object, object], stored: dict[object, object]) -> Record:
    # The path of each name in the nested state dict: torch's conversion utilities index it without asking.
    paths: dict[object, object] = {name: (name,) for name in described}
    meta: dict[str, object] = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
    state = {
        "state_dict_metadata": described,
        "planner_data": paths,
        "storage_data": stored,
        "storage_meta": Record(STORAGE_META, state=meta, new=True),
        "version": VERSION,
    }
    return Record(METADATA, state=state, new=True)
