"""Which bytes of a planned copy need not move, because source and target can share the blocks that hold them.

A file system shares whole blocks, so bytes qualify where they are neighbours in both files and lie at positions that
are equal modulo a block. `spans` says where planners should put tensors for that, and `plan_sharing` what it comes to.
Nothing is opened here; `cloning` does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from ckpt_tools.core.tensors import Store, StoredTensor
from ckpt_tools.engine.ends import End, Plain, leaf_ends
from ckpt_tools.formats.arrangement import ALIGNMENT, STEP
from ckpt_tools.layouts.layout import Layout, Side

WORTH = 64 << 10
"""Bytes of the shortest run that is shared: below, copying costs no more than another system call and extent."""
MOSTLY = 0.75
"""Part of a leaf that has to be shared; a leaf with less is copied, and read for its digest, as a whole."""
SPLIT = 1 << 20
"""Bytes that have to lie at another residue than their neighbours before a chunk is split for their sake."""


class Run(NamedTuple):
    """Bytes that are neighbours in a file of the source and in one of the target."""

    source: str
    source_position: int
    target: str
    target_position: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """Leaves that are put into place without being read as a whole.

    Attributes:
        leaves: their names, with the files of the source that each lies in.
        shared: whole blocks, at positions that are equal modulo a block.
        copied: the rest of those leaves: edges of blocks, and runs that do not line up.
    """

    leaves: Mapping[str, tuple[str, ...]]
    shared: tuple[Run, ...]
    copied: tuple[Run, ...]

    @property
    def targets(self) -> set[str]:
        """Files of the target that are to share blocks."""
        return {run.target for run in self.shared}

    def nbytes(self, refused: frozenset[str] = frozenset()) -> int:
        """Bytes that are shared when some files of the source cannot be."""
        return sum(run.nbytes for run in self.shared if run.source not in refused)

    def placed(self, refused: frozenset[str]) -> set[str]:
        """Leaves that are in place, unless some part of them lies in a file that cannot be shared."""
        return {name for name, files in self.leaves.items() if refused.isdisjoint(files)}


NOTHING = Sharing({}, (), ())


def plan_sharing(ends: Iterable[tuple[str, End, End]], block: int) -> Sharing:
    """What can be shared in blocks of `block` bytes.

    Args:
        ends: each leaf with where it lies in the source and in the target.
        block: bytes of a block.
    """
    leaves: dict[str, tuple[str, ...]] = {}
    found: list[Run] = []
    for name, source, target in ends:
        runs = _runs(source, target) or []
        shared = sum(inside for _, inside in (_blocks(run, block) for run in runs))
        if shared and shared >= MOSTLY * sum(run.nbytes for run in runs):
            leaves[name] = tuple(dict.fromkeys(run.source for run in runs))
            found += runs
    shares: list[Run] = []
    copies: list[Run] = []
    # Neighbours that stay neighbours have no edges between them: fewer calls, and fewer blocks that are not shared.
    for run in _merged(found):
        lead, inside = _blocks(run, block)
        for parts, skipped, nbytes in (
            (copies, 0, lead),
            (shares, lead, inside),
            (copies, lead + inside, run.nbytes - lead - inside),
        ):
            if nbytes:
                parts.append(_part(run, skipped, nbytes))
    return Sharing(leaves, tuple(shares), tuple(copies))


def _blocks(run: Run, block: int) -> tuple[int, int]:
    """(bytes before the first block, bytes in blocks) that can be shared of a run; (0, 0) where that does not pay."""
    lead = -run.target_position % block
    inside = (run.nbytes - lead) // block * block
    fits = inside >= max(WORTH, block) and (run.source_position - run.target_position) % block == 0
    return (lead, inside) if fits else (0, 0)


def _part(run: Run, skipped: int, nbytes: int) -> Run:
    return Run(run.source, run.source_position + skipped, run.target, run.target_position + skipped, nbytes)


def _merged(runs: Iterable[Run]) -> Iterator[Run]:
    """The runs in the order of the source, those that follow each other in both files as one."""
    last: Run | None = None
    for run in sorted(runs):
        if last is not None and run[:4] == _part(last, last.nbytes, 0)[:4]:
            last = last._replace(nbytes=last.nbytes + run.nbytes)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


class Span(NamedTuple):
    """Bytes of a planned chunk, counted from its start, that can be shared where it lies at `residue` in its file."""

    low: int
    high: int
    residue: int


def spans(
    tensors: Iterable[StoredTensor], layout: Layout, side: Side, source: Mapping[str, End]
) -> dict[str, list[Span]]:
    """What could be shared of planned chunks, by file, in the order of their bytes.

    Args:
        tensors: as planned; each chunk has a file of its own and begins at its byte 0.
        layout: of the target.
        side: of the layout that the tensors are named as.
        source: where the leaves lie.
    """
    found: dict[str, list[Span]] = {}
    store = Store(Path(), "memory", {tensor.name: tensor for tensor in tensors}, {})
    for name, target in leaf_ends(store, layout, side).items():
        for run in (_runs(source[name], target) if name in source else None) or ():
            residue = (run.source_position - run.target_position) % ALIGNMENT
            # Positions that are not multiples of the widest element are of no use to readers.
            if run.nbytes >= WORTH and residue % STEP == 0:
                span = Span(run.target_position, run.target_position + run.nbytes, residue)
                found.setdefault(run.target, []).append(span)
    for parts in found.values():
        parts.sort()
    return found


def best_residue(parts: Iterable[Span]) -> int:
    """The residue at which most bytes can be shared."""
    weights: Counter[int] = Counter()
    for part in parts:
        weights[part.residue] += part.high - part.low
    return weights.most_common(1)[0][0]


def split_rows(parts: Iterable[Span], row: int) -> list[tuple[int, int]]:
    """(first row, residue) of the parts that a chunk should be split into, so that most bytes can be shared.

    Args:
        parts: of the chunk, in order, at least one.
        row: bytes of one index of its first dimension.
    """
    groups: list[list[Span]] = []
    for part in parts:
        last = groups[-1] if groups else None
        if last and (part.residue == last[0].residue or part.low // row < -(-last[-1].high // row)):
            last.append(part)
        else:
            groups.append([part])
    kept: list[list[Span]] = []
    for group in groups:
        # Small groups join their neighbour before, or the one after where there is none.
        if kept and (_small(group) or _small(kept[0]) or best_residue(group) == best_residue(kept[-1])):
            kept[-1] += group
        else:
            kept.append(group)
    first, *others = kept
    return [(0, best_residue(first)), *((group[0].low // row, best_residue(group)) for group in others)]


def _small(group: Iterable[Span]) -> bool:
    return sum(part.high - part.low for part in group) < SPLIT


def _runs(source: End, target: End) -> list[Run] | None:
    """The runs that make up a leaf, None where it is encoded, cast, transposed or too scattered for sharing."""
    if not (isinstance(source, Plain) and isinstance(target, Plain) and source.dtype is target.dtype):
        return None
    if len(source.extents) == len(target.extents) == 1:
        (a,), (b,) = source.extents, target.extents
        if a.is_contiguous and b.is_contiguous:
            return [Run(a.file, a.position, b.file, b.position, a.sizes[0] * source.itemsize)]
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
