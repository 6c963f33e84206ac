"""Checkpoints to and from memory: what `automodel` loads a model with and saves it with, on one process or a mesh.

A rank names the boxes of native tensors that it holds; only their bytes are read from the files, and only their bytes
are written into the final files. Nothing is gathered and no whole tensor is held.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.errors import LayoutError, listed
from ckpt_tools.core.tensors import Chunk, Store, StoredTensor, TargetFiles
from ckpt_tools.engine.bounds import SLACK, check_disk
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.copy import write_frames, write_side_files
from ckpt_tools.engine.digest import SEGMENT
from ckpt_tools.engine.ends import Plain, decoded_as, leaf_ends, plain
from ckpt_tools.engine.execute import Task, run_task, run_threads
from ckpt_tools.engine.extents import Extent, NativeExtents, leaf_extents
from ckpt_tools.engine.files import FileReader, FileWriter, MemoryFiles
from ckpt_tools.engine.manifest import Manifest
from ckpt_tools.engine.plan import LeafCopy
from ckpt_tools.engine.sides import repository_side_files
from ckpt_tools.engine.staging import Staging
from ckpt_tools.engine.targets import repository_tensors
from ckpt_tools.engine.transfer import Reader, Writer
from ckpt_tools.families import get_family
from ckpt_tools.families.family import LAYOUT_VERSION
from ckpt_tools.formats import hf
from ckpt_tools.layouts.layout import Layout
from ckpt_tools.version import TOOL

GAP = 64 << 10
"""Bytes between two wanted runs of a file that are read along: as long as what a read of their own would cost."""


@dataclass(frozen=True)
class Box:
    """One rank's part of a native tensor, in memory.

    Attributes:
        name: name of the native tensor.
        offsets: first index of the part along each dimension.
        sizes: extent of the part along each dimension.
        dtype: of the elements in memory.
        data: their bytes, row-major: `prod(sizes) * itemsize` of them; writable when loading.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: DType
    data: memoryview


def model_layout(checkpoint: Checkpoint, names: Collection[str]) -> Layout:
    """The layout whose native side is a model's tensors, to be filled from a checkpoint of the same family.

    The model's names decide which side of the family's layout it holds, and whether it has the optional layers.

    Args:
        checkpoint: the opened checkpoint.
        names: of the model's parameters and saved buffers.

    Raises:
        LayoutError: the model has parameters that the checkpoint does not fill, or the other way round, optional
            layers excepted.
    """
    layout = checkpoint.layout
    if not layout.is_identity:
        layout = get_family(layout.family).layout(checkpoint.config, form=layout.form, names=names).of_names(names)
    wanted, there = set(names), layout.native.keys()
    faults = [
        f"{len(lost):,} {what}\n{listed(sorted(lost))}"
        for lost, what in (
            (wanted - there, "parameters of the model are not in the checkpoint"),
            (there - wanted, "tensors of the checkpoint have no parameter in the model"),
            (layout.leaves.keys() - checkpoint.layout.leaves.keys(), "tensors that the model needs are not there"),
        )
        if lost
    ]
    if faults:
        raise LayoutError(f"{checkpoint.root} does not fit the model:\n" + "\n".join(faults))
    return layout


def load_boxes(
    checkpoint: Checkpoint, boxes: Sequence[Box], *, layout: Layout | None = None, threads: int | None = None
) -> None:
    """Fills boxes of native tensors from a Hugging Face repository or a native checkpoint.

    Args:
        checkpoint: the opened checkpoint.
        boxes: parts to fill; any part of the model, so that a caller can bound its memory by groups.
        layout: of the boxes, from `model_layout`; None takes the checkpoint's own.
        threads: worker threads.

    Raises:
        LayoutError: a name is unknown, a box leaves its tensor, or the checkpoint lacks an element of it.
        StorageError: a read failed.
    """
    layout = layout or checkpoint.layout
    for box in boxes:
        if box.name not in layout.native:
            raise LayoutError(f"{checkpoint.root} has no tensor {box.name}")
    target = _memory_store(layout, boxes)
    names = {box.name for box in boxes}
    shared = checkpoint.shared
    leaves = {shared.get(leaf, leaf) for name in names for leaf in layout.native[name].leaves}
    incoming = leaf_ends(checkpoint.store, checkpoint.layout, checkpoint.side, leaves)
    copies = (
        (LeafCopy(leaf, (), decoded_as(incoming[shared.get(leaf, leaf)], end.dtype), end), end)
        for leaf, end in _box_ends(layout, target)
    )
    with FileReader(checkpoint.root, checkpoint.inputs) as reader:
        _run_parts(copies, reader, _files(boxes), threads, GAP)


class RepositoryExport:
    """Writes a Hugging Face repository out of the boxes that the ranks of a mesh hold.

    One process calls `prepare`, then every process `write` with its boxes, then, after a barrier, the first one
    `commit`. The directory appears under its final name only then. Replicated boxes are written by one rank.

    Args:
        layout: of the model.
        config: its config.json.
        destination: directory to make; on a file system that all ranks share.
        dtypes: of each native tensor in the files.
        max_shard_size: bytes of tensor data in one file.
        side_files_from: directory with tokenizer, generation config and so on, copied byte for byte.
        overwrite: an existing directory may be replaced.
        source: where the model came from, recorded in the manifest.
    """

    def __init__(
        self,
        layout: Layout,
        config: Mapping[str, Any],
        destination: Path,
        *,
        dtypes: Mapping[str, DType],
        max_shard_size: int,
        side_files_from: Path | None = None,
        overwrite: bool = False,
        source: Mapping[str, str] | None = None,
    ) -> None:
        self._layout = layout
        self._config = config
        self._side_files_from = side_files_from
        self._source = dict(source or {})
        self._leaf_dtypes = {leaf: dtypes[name] for name, t in layout.native.items() for leaf in t.leaves}
        self._target: TargetFiles = hf.plan_repository(
            repository_tensors(layout, self._leaf_dtypes), max_shard_size=max_shard_size
        )
        self._ends = leaf_ends(self._target.store, layout, "hf")
        self._staging = Staging(Path(destination), overwrite=overwrite)

    def prepare(self) -> None:
        """Takes the lock, checks the disk and makes the files at their final sizes.

        Raises:
            CkptError: the output exists, is locked, or does not fit on the disk.
        """
        self._staging.__enter__()
        check_disk(self._staging.path, sum(self._target.store.files.values()) + SLACK)
        # Ranks keep no journal, and an interrupted export may have been cut into other files.
        self._staging.restart()
        with FileWriter(self._staging.path) as writer:
            write_frames(self._target, writer)

    def write(self, boxes: Sequence[Box], *, threads: int | None = None) -> None:
        """Writes the elements of these boxes into the files and syncs them."""
        source = _memory_store(self._layout, boxes)
        copies = ((LeafCopy(leaf, (), end, self._ends[leaf]), end) for leaf, end in _box_ends(self._layout, source))
        with FileWriter(self._staging.path) as writer:
            _run_parts(copies, _files(boxes), writer, threads)
            writer.sync()

    def commit(self) -> None:
        """Adds index, config and side files, and renames the directory to its final name."""
        manifest = Manifest(self._layout.family, LAYOUT_VERSION, "hf", TOOL, source=self._source)
        side_files = repository_side_files(self._config, self._side_files_from, self._layout, self._leaf_dtypes)
        write_side_files(self._staging, self._target.documents, side_files, manifest)
        self._staging.commit()
        self._staging.__exit__()

    def abort(self) -> None:
        """Removes what was made and lets the lock go; the destination is as it was."""
        self._staging.discard()
        self._staging.__exit__()


def _memory_store(layout: Layout, boxes: Sequence[Box]) -> Store:
    """A store whose files are the boxes: `0`, `1`, ... by their order."""
    tensors: dict[str, StoredTensor] = {}
    for index, box in enumerate(boxes):
        shape = layout.native[box.name].shape
        inside = len(box.offsets) == len(box.sizes) == len(shape) and all(
            o >= 0 and o + n <= s for o, n, s in zip(box.offsets, box.sizes, shape, strict=True)
        )
        chunk = Chunk(box.offsets, box.sizes, str(index), 0)
        if not inside or len(box.data) != box.dtype.nbytes(chunk.numel):
            raise LayoutError(f"a box of {box.name} at {box.offsets} of {box.sizes} does not fit its shape {shape}")
        known = tensors.get(box.name)
        if known is not None and known.dtype is not box.dtype:
            raise LayoutError(f"boxes of {box.name} are {known.dtype} and {box.dtype}")
        tensors[box.name] = StoredTensor(box.name, box.dtype, shape, (*(known.chunks if known else ()), chunk))
    return Store(Path(), "memory", tensors, {str(i): len(box.data) for i, box in enumerate(boxes)})


def _box_ends(layout: Layout, store: Store) -> Iterator[tuple[str, Plain]]:
    """(leaf, end) of the extents of the boxes: all of a leaf's together where they leave no gap, else one by one."""
    extents = NativeExtents()
    for name, tensor in store.tensors.items():
        found: dict[str, list[Extent]] = {}
        if layout.is_identity:
            found[name] = leaf_extents(tensor)
        else:
            for leaf, part in extents.of(tensor, layout.native[name]):
                found.setdefault(leaf, []).append(part)
        for leaf, parts in found.items():
            if sum(part.numel for part in parts) == _reach(parts):
                yield leaf, plain(tensor, parts)
            else:
                yield from ((leaf, plain(tensor, [part])) for part in parts)


def _reach(parts: Sequence[Extent]) -> int:
    """Elements of the leaf from the first to the last one of the extents."""
    ends = (p.leaf_start + sum((n - 1) * s for n, s in zip(p.sizes, p.leaf_strides, strict=True)) for p in parts)
    return max(ends, default=-1) + 1 - min((p.leaf_start for p in parts), default=0)


def _files(boxes: Sequence[Box]) -> MemoryFiles:
    return MemoryFiles((str(i), box.data) for i, box in enumerate(boxes))


def _run_parts(
    copies: Iterable[tuple[LeafCopy, Plain]], reader: Reader, writer: Writer, threads: int | None, gap: int = 0
) -> None:
    """Runs copies that concern only the elements of their extents.

    A copy becomes tasks for ranges of the leaf, which hold those elements and runs of up to `gap` bytes of others; of a
    quantised source no others, which would have to be decoded too.
    """
    tasks = (
        Task(0, copy, low, high)
        for copy, end in copies
        for low, high in _ranges(end, gap if isinstance(copy.source, Plain) else 0)
    )
    run_threads(tasks, lambda task: run_task(task, reader, writer, None), threads)


def _ranges(end: Plain, gap: int) -> Iterator[tuple[int, int]]:
    """Leaf ranges that hold the elements of an end, cut so that threads share large ones."""
    step = max(1, SEGMENT // end.itemsize)
    start = end.extents[0].leaf_start if end.extents else 0
    reach = _reach(end.extents)
    whole = [(start, start + reach)] if sum(part.numel for part in end.extents) == reach else None
    for low, high in whole or leaf_ranges(end.extents[0], gap // end.itemsize):
        yield from ((first, min(first + step, high)) for first in range(low, high, step))


def leaf_ranges(part: Extent, gap: int = 0) -> Iterator[tuple[int, int]]:
    """Leaf ranges that hold the extent's elements, and others only where up to `gap` of them lie between two runs."""
    inner, reach = len(part.sizes), 1
    while inner and part.leaf_strides[inner - 1] - reach <= gap:
        inner -= 1
        reach += (part.sizes[inner] - 1) * part.leaf_strides[inner]
    steps = (range(0, n * stride, stride) for n, stride in zip(part.sizes[:inner], part.leaf_strides, strict=False))
    for offsets in product(*steps):
        low = part.leaf_start + sum(offsets)
        yield low, low + reach
