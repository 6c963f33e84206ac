"""The plan of a copy from one checkpoint to another: what is read from where and written to where, nothing opened yet.

A plan is a list of leaf copies over two sets of extents. It is proven before the first write: every leaf is in the
source exactly once, every byte of every target file is written exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.errors import LayoutError
from ckpt_tools.core.tensors import TargetFiles
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.digest import SEGMENT
from ckpt_tools.engine.extents import Extent, addressable, store_extents
from ckpt_tools.engine.prove import prove_chunks, prove_files, prove_leaf
from ckpt_tools.layouts.layout import Layout, Side


@dataclass(frozen=True, slots=True)
class LeafCopy:
    """One leaf on its way from the source to the target.

    Attributes:
        name: its Hugging Face name.
        items: number of items (elements, or bytes for types narrower than a byte).
        source: its extents in the source, sorted by leaf position.
        target: its extents in the target, sorted by leaf position.
        source_dtype: dtype in the source.
        target_dtype: dtype in the target; another one means a cast.
    """

    name: str
    items: int
    source: tuple[Extent, ...]
    target: tuple[Extent, ...]
    source_dtype: DType
    target_dtype: DType

    @property
    def source_itemsize(self) -> int:
        return addressable(self.source_dtype, 0)[0]

    @property
    def target_itemsize(self) -> int:
        return addressable(self.target_dtype, 0)[0]

    @property
    def casts(self) -> bool:
        return self.source_dtype is not self.target_dtype

    def segments(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) items of each segment; an empty leaf has one empty segment."""
        step = SEGMENT // self.target_itemsize
        yield from ((low, min(low + step, self.items)) for low in range(0, max(self.items, 1), step))


@dataclass(slots=True)
class Plan:
    """A proven copy.

    Attributes:
        source: the opened source.
        target: the files to write.
        side: side of the layout that the target holds.
        copies: one for each leaf, ordered by where its source begins, so that files are read forward.
    """

    source: Checkpoint
    target: TargetFiles
    side: Side
    copies: list[LeafCopy]

    @property
    def nbytes_written(self) -> int:
        return sum(self.target.store.files.values())


def target_dtypes(source: Checkpoint, dtype: DType | None) -> dict[str, DType]:
    """Dtype of each leaf in the target: as in the source, or `dtype` for floating-point leaves that may be cast."""
    leaves = source.layout.leaves
    return {
        name: dtype if dtype and stored.is_float and not leaves[name].keep_dtype else stored
        for name, stored in source.leaf_dtypes().items()
    }


def native_dtypes(layout: Layout, leaf_dtypes: Mapping[str, DType]) -> dict[str, DType]:
    """Dtype of each native tensor.

    Raises:
        LayoutError: the pieces of a native tensor have different dtypes.
    """
    dtypes: dict[str, DType] = {}
    for name, tensor in layout.native.items():
        kinds = {leaf_dtypes[piece.leaf].name: piece.leaf for piece in tensor.view.pieces}
        if len(kinds) > 1:
            raise LayoutError(
                f"{name} cannot be made of pieces of different dtypes: "
                + ", ".join(f"{leaf} is {kind}" for kind, leaf in kinds.items()),
                hint="give --dtype to cast them to one",
            )
        dtypes[name] = leaf_dtypes[tensor.view.pieces[0].leaf]
    return dtypes


def plan_copy(source: Checkpoint, target: TargetFiles, side: Side, leaf_dtypes: Mapping[str, DType]) -> Plan:
    """The proven plan that fills `target` from `source`.

    Args:
        source: the opened source.
        target: planned files, whose tensors are named as `side` says.
        side: side of the layout that the target holds.
        leaf_dtypes: dtype of each leaf in the target.

    Raises:
        LayoutError: the source does not hold every leaf once, or the target would not be written exactly once.
    """
    incoming = source.extents()
    outgoing = store_extents(target.store, source.layout.views(side, target.store.tensors))
    stored = source.leaf_dtypes()
    copies = []
    for name in incoming:
        _, items = addressable(stored[name], source.layout.leaves[name].numel)
        prove_leaf(name, outgoing[name], items, "the target")
        copies.append(
            LeafCopy(name, items, _ordered(incoming[name]), _ordered(outgoing[name]), stored[name], leaf_dtypes[name])
        )
    prove_chunks(target.store, ((e, copy.target_itemsize) for copy in copies for e in copy.target))
    prove_files(target.store, target.framing)
    copies.sort(key=lambda c: (c.source[0].file, c.source[0].position) if c.source else ("", 0))
    return Plan(source, target, side, copies)


def _ordered(extents: list[Extent]) -> tuple[Extent, ...]:
    return tuple(sorted(extents, key=lambda e: e.leaf_start))
