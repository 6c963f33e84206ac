"""The files of an output, planned: which tensors, of which dtype, in which file at which position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Literal

from ckpt_tools.core.collector import no_collection
from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.tensors import Chunk, StoredTensor, TargetFiles
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.ends import End
from ckpt_tools.engine.plan import Plan, native_dtypes, plan_copy, target_dtypes
from ckpt_tools.engine.sharding import ShardingMesh, boxes
from ckpt_tools.engine.sharing import best_residue, plan_sharing, spans, split_rows
from ckpt_tools.formats import dcp, hf, sharded_safetensors
from ckpt_tools.layouts.layout import Layout, Side

NativeFormat = Literal["dcp", "safetensors"]
Placement = tuple[tuple[int, ...], tuple[int, ...], str]
Tensors = dict[str, tuple[DType, tuple[int, ...], list[Placement]]]


@no_collection()
def plan_native(
    source: Checkpoint,
    *,
    mesh: ShardingMesh | None,
    file_format: NativeFormat,
    dtype: DType | None,
    max_file_size: int,
    layout: Layout | None = None,
    block: int | None = None,
) -> Plan:
    """The plan of a native checkpoint, sharded for `mesh` or whole in files of at most `max_file_size` bytes.

    Its tensors are the native ones of `layout`, by default of the source's. With `block`, the size of the blocks that
    source and target can share, they lie where most of them are.
    """
    layout = layout or source.layout
    leaf_dtypes = target_dtypes(source, dtype)
    dtypes = native_dtypes(layout, leaf_dtypes)
    place = _whole(layout, dtypes, max_file_size) if mesh is None else _sharded(layout, mesh)
    tensors: Tensors = {name: (dtypes[name], t.shape, []) for name, t in layout.native.items()}
    for name, offsets, sizes, number in place:
        file = f"__{number}_0.distcp" if mesh else f"__0_{number}.distcp"
        if file_format == "safetensors":
            file = f"shard-{number + 1:05d}-model-00001-of-00001.safetensors"
        tensors[name][2].append((offsets, sizes, file))
    planner = dcp.plan_dcp if file_format == "dcp" else sharded_safetensors.plan_sharded
    if block is None:
        target: TargetFiles = planner(tensors)
        return plan_copy(source, target, "native", layout)
    incoming = source.ends()
    # A safetensors file has one place for a tensor; a .distcp file has as many as a tensor has parts.
    tensors, wanted = _congruent(tensors, layout, "native", incoming, split=file_format == "dcp")
    return _sharing(plan_copy(source, planner(tensors, wanted), "native", layout, incoming=incoming), block)


@no_collection()
def plan_huggingface(
    source: Checkpoint,
    *,
    dtype: DType | None,
    max_shard_size: int,
    layout: Layout | None = None,
    block: int | None = None,
) -> Plan:
    """The plan of a Hugging Face repository in shards of at most `max_shard_size` bytes.

    Args:
        source: the opened source.
        dtype: that plain floating-point leaves are cast to, or None.
        max_shard_size: bytes of tensor data in one file.
        layout: of the target where its form differs from the source's.
        block: size of the blocks that source and target can share, None where they cannot.
    """
    layout = layout or source.layout
    tensors = repository_tensors(layout, target_dtypes(source, dtype))
    if block is None:
        return plan_copy(source, hf.plan_repository(tensors, max_shard_size=max_shard_size), "hf", layout)
    incoming = source.ends()
    whole: Tensors = {name: (kind, size, [((0,) * len(size), size, "")]) for name, (kind, size) in tensors.items()}
    wanted = {name: n for (name, _), n in _congruent(whole, layout, "hf", incoming, split=False)[1].items()}
    target = hf.plan_repository(tensors, max_shard_size=max_shard_size, residues=wanted)
    return _sharing(plan_copy(source, target, "hf", layout, incoming=incoming), block)


def _congruent(
    tensors: Tensors, layout: Layout, side: Side, incoming: Mapping[str, End], *, split: bool
) -> tuple[Tensors, dict[tuple[str, tuple[int, ...]], int]]:
    """Tensors cut where their source changes its position modulo a block, and that position for every chunk.

    Args:
        tensors: as they would be placed otherwise.
        layout: of the target.
        side: of the layout that the tensors are named as.
        incoming: where the leaves lie in the source.
        split: chunks may be cut along their first dimension.
    """
    provisional = (
        StoredTensor(name, dtype, shape, tuple(Chunk(o, n, f"{name} {i}", 0) for i, (o, n, _) in enumerate(chunks)))
        for name, (dtype, shape, chunks) in tensors.items()
    )
    found = spans(provisional, layout, side, incoming)
    cut: Tensors = {}
    residues: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, (dtype, shape, chunks) in tensors.items():
        cut[name] = (dtype, shape, [])
        for number, (offsets, sizes, file) in enumerate(chunks):
            parts = found.get(f"{name} {number}")
            if parts is None or not split or dtype.bits % 8:
                cut[name][2].append((offsets, sizes, file))
                if parts is not None:
                    residues[name, offsets] = best_residue(parts)
                continue
            starts = split_rows(parts, dtype.nbytes(prod(sizes[1:])))
            for (first, residue), last in zip(starts, (*(row for row, _ in starts[1:]), sizes[0]), strict=True):
                begin = (offsets[0] + first, *offsets[1:])
                cut[name][2].append((begin, (last - first, *sizes[1:]), file))
                residues[name, begin] = residue
    return cut, residues


def _sharing(plan: Plan, block: int) -> Plan:
    """The plan with what can be shared in blocks of that size."""
    ends = ((copy.name, copy.source, copy.target) for copy in plan.copies if copy.target)
    return replace(plan, sharing=plan_sharing(ends, block))


def repository_tensors(layout: Layout, leaf_dtypes: Mapping[str, DType]) -> dict[str, tuple[DType, tuple[int, ...]]]:
    """The tensors of a repository in the order of its files: by name, numbers in names by value."""
    found: dict[str, tuple[DType, tuple[int, ...]]] = {}
    for name in sorted(leaf_dtypes, key=_natural):
        leaf = layout.leaves[name]
        if leaf.encoding is None:
            found[name] = (leaf_dtypes[name], leaf.shape)
        else:
            found.update({part.name: (part.dtype, part.shape) for part in leaf.encoding.parts(name, leaf.shape)})
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _whole(
    layout: Layout, dtypes: Mapping[str, DType], max_file_size: int
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
    number = filled = 0
    for name, tensor in layout.native.items():
        size = dtypes[name].nbytes(prod(tensor.shape))
        if filled and filled + size > max_file_size:
            number, filled = number + 1, 0
        filled += size
        yield name, (0,) * len(tensor.shape), tensor.shape, number


def _sharded(layout: Layout, mesh: ShardingMesh) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
    known: dict[tuple[tuple[int, ...], bool], list[tuple[int, tuple[int, ...], tuple[int, ...]]]] = {}
    for name, tensor in layout.native.items():
        stacked = name in layout.stacked
        parts = known.get((tensor.shape, stacked))
        if parts is None:
            parts = known[tensor.shape, stacked] = list(boxes(tensor.shape, mesh, stacked=stacked))
        yield from ((name, offsets, sizes, rank) for rank, offsets, sizes in parts)
