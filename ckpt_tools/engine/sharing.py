"""Which bytes of a planned copy need not move, because source and target can share the blocks that hold them.

A file system shares whole blocks, so bytes qualify where they are neighbours in both files and lie at positions that
are equal modulo a block. `residues` says where planners should put tensors for that, and `placement_of` what it comes
to for a leaf. Nothing is opened here; `cloning` does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from ckpt_tools.core.tensors import ChunkResidues, Store, StoredTensor
from ckpt_tools.engine.ends import End, Plain, leaf_ends
from ckpt_tools.formats.arrangement import ALIGNMENT, STEP
from ckpt_tools.layouts.layout import Layout, Side

WORTH = 64 << 10
"""Bytes of the shortest run that is shared: below, copying costs no more than another system call and extent."""
MOSTLY = 0.75
"""Part of a leaf that has to be shared; a leaf with less is copied, and read for its digest, as a whole."""


class Run(NamedTuple):
    """Bytes of a leaf that are neighbours in a file of the source and in one of the target."""

    source: str
    source_position: int
    target: str
    target_position: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """A leaf that is put into place without being read as a whole.

    Attributes:
        shared: whole blocks, at positions that are equal modulo a block.
        copied: the rest of the leaf: edges of those, and runs that do not line up.
    """

    shared: tuple[Run, ...]
    copied: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are shared."""
        return sum(run.nbytes for run in self.shared)


def placement_of(source: End, target: End, block: int) -> Placement | None:
    """How a leaf gets from one end to the other by sharing blocks of `block` bytes; None where that does not pay."""
    found = _runs(source, target)
    if found is None:
        return None
    shared: list[Run] = []
    copied: list[Run] = []
    for run in found:
        lead = -run.target_position % block
        inside = (run.nbytes - lead) // block * block
        if inside < max(WORTH, block) or (run.source_position - run.target_position) % block:
            copied.append(run)
            continue
        shared.append(_part(run, lead, inside))
        edges = (_part(run, 0, lead), _part(run, lead + inside, run.nbytes - lead - inside))
        copied += (edge for edge in edges if edge.nbytes)
    placement = Placement(tuple(shared), tuple(copied))
    moved = sum(run.nbytes for run in copied)
    return placement if shared and placement.nbytes >= MOSTLY * (placement.nbytes + moved) else None


def residues(tensors: Iterable[StoredTensor], layout: Layout, side: Side, source: Mapping[str, End]) -> ChunkResidues:
    """Where planned chunks can share most of their bytes: position of the source's bytes modulo `ALIGNMENT`.

    Args:
        tensors: as planned; each chunk has a file of its own and begins at its byte 0.
        layout: of the target.
        side: of the layout that the tensors are named as.
        source: where the leaves lie.
    """
    store = Store(Path(), "memory", {tensor.name: tensor for tensor in tensors}, {})
    weights: dict[str, Counter[int]] = {}
    for name, target in leaf_ends(store, layout, side).items():
        for run in (_runs(source[name], target) if name in source else None) or ():
            if run.nbytes >= WORTH:
                residue = (run.source_position - run.target_position) % ALIGNMENT
                weights.setdefault(run.target, Counter())[residue] += run.nbytes
    best = {file: found.most_common(1)[0][0] for file, found in weights.items()}
    return {
        (tensor.name, chunk.offsets): best[chunk.file]
        for tensor in store.tensors.values()
        for chunk in tensor.chunks
        # Positions that would not be multiples of the widest element are of no use to readers.
        if best.get(chunk.file, 1) % STEP == 0
    }


def _part(run: Run, skipped: int, nbytes: int) -> Run:
    return run._replace(
        source_position=run.source_position + skipped, target_position=run.target_position + skipped, nbytes=nbytes
    )


def _runs(source: End, target: End) -> list[Run] | None:
    """The runs that make up a leaf, None where it is encoded, cast, transposed or too scattered for sharing."""
    if not (isinstance(source, Plain) and isinstance(target, Plain) and source.dtype is target.dtype):
        return None
    theirs, ours = _pieces(source), _pieces(target)
    if theirs is None or ours is None:
        return None
    return list(_overlaps(theirs, ours))


class _Piece(NamedTuple):
    """Bytes of a leaf, from `low` to `high`, that are neighbours in one file."""

    low: int
    high: int
    file: str
    position: int


def _pieces(end: Plain) -> list[_Piece] | None:
    """The runs of an end in the order of the leaf; None where some are shorter than `WORTH` by their strides."""
    found: list[_Piece] = []
    width = end.itemsize
    for part in end.extents:
        nbytes = part.sizes[-1] * width
        if part.leaf_strides[-1] != 1 or part.file_strides[-1] != 1 or (len(part.sizes) > 1 and nbytes < WORTH):
            return None
        for steps in product(*map(range, part.sizes[:-1])):
            low = (part.leaf_start + sum(map(int.__mul__, steps, part.leaf_strides))) * width
            position = part.position + sum(map(int.__mul__, steps, part.file_strides)) * width
            found.append(_Piece(low, low + nbytes, part.file, position))
    found.sort()
    return found


def _overlaps(theirs: list[_Piece], ours: list[_Piece]) -> Iterator[Run]:
    """What pieces of two stores have in common; each list covers the leaf once, in order."""
    i = j = 0
    while i < len(theirs) and j < len(ours):
        a, b = theirs[i], ours[j]
        low, high = max(a.low, b.low), min(a.high, b.high)
        if low < high:
            yield Run(a.file, a.position + low - a.low, b.file, b.position + low - b.low, high - low)
        i, j = i + (a.high <= b.high), j + (b.high <= a.high)
