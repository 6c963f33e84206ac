"""Plans a DCP checkpoint: aligned archives one after another in each `.distcp` file, and the `.metadata` document.

Plain `torch.distributed.checkpoint.load` reads the result into any mesh; torch is not needed to write it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from ckpt_tools.formats.tiling import Box, find_fault

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
    lengths: list[int] = []
    ends: dict[str, int] = {}
    for name, (dtype, shape, planned) in tensors.items():
        if fault := find_fault(shape, [(offsets, sizes) for offsets, sizes, _ in planned]):
            raise UsageError(f"the chunks planned for {name!r} do not make up {list(shape)}: {fault}")
        chunks = []
        for offsets, sizes, file in planned:
            start = ends.get(file, 0)
            around = frame(dtype, sizes, start, residues.get((name, tuple(offsets)), 0))
            # The padding stays a hole: thousands of paddings would cost more memory than the plan.
            framing.append(Framing(file, start, around.head))
            framing.append(Framing(file, around.end - len(around.suffix), around.suffix))
            ends[file] = around.end
            lengths.append(around.end - start)
            chunks.append(Chunk(tuple(offsets), tuple(sizes), file, around.data_position))
        store.tensors[name] = StoredTensor(name, dtype, tuple(shape), tuple(chunks))
    store.files = ends
    places = zip(framing[::2], lengths, strict=True)
    document = dumps(_document(store.tensors, ((p.position, length) for p, length in places)), shared={SIZE, CHUNK})
    return TargetFiles(store, tuple(framing), {METADATA_FILE: document})


class _Records:
    """The records of `.metadata`. Sizes and boxes recur from layer to layer: each is made, written and read once."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[int, ...], Record] = {}
        self._boxes: dict[Box, Record] = {}

    def size(self, numbers: tuple[int, ...]) -> Record:
        found = self._sizes.get(numbers)
        if found is None:
            found = self._sizes[numbers] = Record(SIZE, (numbers,))
        return found

    def box(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Record:
        found = self._boxes.get((offsets, sizes))
        if found is None:
            state = {"offsets": self.size(offsets), "sizes": self.size(sizes)}
            found = self._boxes[offsets, sizes] = Record(CHUNK, state=state, new=True)
        return found

    def index(self, name: str, offsets: tuple[int, ...], number: int) -> Record:
        return Record(INDEX, state={"fqn": name, "index": number, "offset": self.size(offsets)}, new=True)

    def tensor(self, tensor: StoredTensor) -> Record:
        layout = Record(LAYOUT, ("torch.strided",))
        contiguous = Record(MEMORY_FORMAT, (0,))
        properties = (Global("torch", str(tensor.dtype.torch_name)), layout, False, contiguous, False)
        state = {
            "properties": Record(PROPERTIES, state=properties, new=True),
            "size": self.size(tensor.shape),
            "chunks": [self.box(chunk.offsets, chunk.sizes) for chunk in tensor.chunks],
        }
        return Record(TENSOR, state=state, new=True)


def _document(tensors: Mapping[str, StoredTensor], places: Iterable[tuple[int, int]]) -> Record:
    """The content of `.metadata`, given position and length of the archive of each chunk in order."""
    records = _Records()
    archives = iter(places)

    def stored() -> Iterator[tuple[Record, Record]]:
        for name, tensor in tensors.items():
            for number, chunk in enumerate(tensor.chunks):
                position, length = next(archives)
                place = {"relative_path": chunk.file, "offset": position, "length": length}
                yield records.index(name, chunk.offsets, number), Record(STORAGE_INFO, state=place, new=True)

    meta: dict[str, object] = {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
    state = {
        "state_dict_metadata": ((name, records.tensor(tensor)) for name, tensor in tensors.items()),
        # The path of each name in the nested state dict: torch's conversion utilities index it without asking.
        "planner_data": ((name, (name,)) for name in tensors),
        "storage_data": stored(),
        "storage_meta": Record(STORAGE_META, state=meta, new=True),
        "version": VERSION,
    }
    return Record(METADATA, state=state, new=True)
