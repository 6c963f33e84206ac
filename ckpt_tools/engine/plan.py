"""The plan of a copy from one checkpoint to another: what is read from where and written to where, nothing opened yet.

A plan is a list of leaf copies over two sets of extents. It is proven before the first write: every leaf is in the
source exactly once, every byte of every target file is written exactly once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.errors import LayoutError
from ckpt_tools.core.tensors import TargetFiles
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.digest import SEGMENT, segments
from ckpt_tools.engine.ends import Encoded, End, InPlace, Plain, decoded_as, leaf_ends, plains, prove_end
from ckpt_tools.engine.extents import items_of
from ckpt_tools.engine.prove import prove_chunks, prove_files
from ckpt_tools.engine.sharing import NOTHING, Sharing
from ckpt_tools.layouts.layout import Layout, Side


@dataclass(frozen=True, slots=True)
class LeafCopy:
    """One leaf on its way from the source to the target.

    Attributes:
        name: its Hugging Face name.
        shape: its shape in items (elements, or bytes in one row for types narrower than a byte).
        source: where it is read.
        target: where it is written; None for a leaf that is only read.
    """

    name: str
    shape: tuple[int, ...]
    source: End
    target: End | None = None

    @property
    def items(self) -> int:
        return prod(self.shape)

    @property
    def changes_values(self) -> bool:
        """Whether the target holds other bytes than the source: a cast, a dequantisation or a quantisation."""
        return not (
            isinstance(self.source, Plain) and isinstance(self.target, Plain) and self.source.dtype is self.target.dtype
        )

    @property
    def dequantises(self) -> bool:
        return isinstance(self.source, Encoded) and isinstance(self.target, Plain)

    @property
    def quantises(self) -> bool:
        return isinstance(self.target, Encoded)

    def segments(self) -> Iterator[tuple[int, int]]:
        """(first, last + 1) items of each segment; an empty leaf has one empty segment."""
        end = self.target or self.source
        most = SEGMENT // end.itemsize
        if isinstance(end, Plain):
            yield from segments(self.shape, most)
            return
        step = max(1, most // end.write_step) * end.write_step
        yield from ((low, min(low + step, self.items)) for low in range(0, max(self.items, 1), step))


@dataclass(slots=True)
class Plan:
    """A proven copy.

    Attributes:
        source: the opened source.
        target: the files to write.
        side: side of the layout that the target holds.
        copies: one for each leaf, ordered by where its source begins, so that files are read forward.
        sharing: leaves of `copies` that can share their blocks with the source.
    """

    source: Checkpoint
    target: TargetFiles
    side: Side
    copies: list[LeafCopy]
    sharing: Sharing = NOTHING

    @property
    def nbytes_written(self) -> int:
        return sum(self.target.store.files.values())


def in_place(copies: Sequence[LeafCopy], placed: Collection[str]) -> list[LeafCopy]:
    """The copies, of which those of leaves that are in place write nothing."""
    return [
        replace(copy, target=InPlace(copy.target.extents, copy.target.dtype, copy.target.itemsize))
        if copy.name in placed and isinstance(copy.target, Plain)
        else copy
        for copy in copies
    ]


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
        kinds = {leaf_dtypes[leaf].name: leaf for leaf in tensor.leaves}
        if len(kinds) > 1:
            raise LayoutError(
                f"{name} cannot be made of pieces of different dtypes: "
                + ", ".join(f"{leaf} is {kind}" for kind, leaf in kinds.items()),
                hint="give --dtype to cast them to one",
            )
        dtypes[name] = leaf_dtypes[tensor.leaves[0]]
    return dtypes


def plan_copy(
    source: Checkpoint,
    target: TargetFiles,
    side: Side,
    layout: Layout | None = None,
    *,
    incoming: Mapping[str, End] | None = None,
) -> Plan:
    """The proven plan that fills `target` from `source`.

    Args:
        source: the opened source.
        target: planned files, whose tensors are named as `side` says.
        side: side of the layout that the target holds.
        layout: of the target where its Hugging Face form differs from the source's; the leaves are the same.
        incoming: the source's proven ends, where the caller has them.

    Raises:
        LayoutError: the source does not hold every leaf once, or the target would not be written exactly once.
    """
    layout = layout or source.layout
    incoming = source.ends() if incoming is None else incoming
    outgoing = leaf_ends(target.store, layout, side)
    if incoming.keys() != outgoing.keys():
        raise LayoutError(
            f"the forms of {source.root} and of the target do not have the same tensors",
            hint="convert to a native checkpoint first, then consolidate into the other form",
        )
    copies = []
    for name, end in incoming.items():
        shape = items_of(end.dtype, source.layout.leaves[name].shape)
        prove_end(name, outgoing[name], prod(shape), "the target")
        copies.append(LeafCopy(name, shape, decoded_as(end, outgoing[name].dtype), outgoing[name]))
    stored = (plain for end in outgoing.values() for plain in plains(end))
    prove_chunks(target.store, ((extent, plain.itemsize) for plain in stored for extent in plain.extents))
    prove_files(target.store, target.framing)
    copies.sort(key=lambda c: c.source.first())
    return Plan(source, target, side, copies)
