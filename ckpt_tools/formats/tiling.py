"""Proof, from offsets and sizes alone, that the saved boxes of a tensor cover each of its elements exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final

from ckpt_tools.core.errors import FormatError

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
_NEIGHBOURS: Final = 128
"""Boxes that a box is compared with on average: a grid over ranks has as many as its second longest side."""


class _Tangle(Exception):
    """More comparisons than any sharding over ranks needs; a hostile description could ask for quadratic work."""


def find_fault(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """What is wrong with `boxes` as a tiling of `shape`, None when they are one.

    Boxes without elements are ignored. Time is near linear for grids: boxes are swept along the dimension with the
    most cuts, and compared only with those that reach the same slab.
    """
    full = [box for box in boxes if 0 not in box[1]]
    for offsets, sizes in full:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"the piece at {list(offsets)} of size {list(sizes)} has another number of dimensions"
        if any(o < 0 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            return f"the piece at {list(offsets)} of size {list(sizes)} reaches outside"
    try:
        overlap = _find_overlap(full, len(shape))
    except _Tangle:
        return f"its {len(full):,} pieces are no grid"
    if overlap:
        (a, a_sizes), (b, b_sizes) = overlap
        return f"the pieces at {list(a)} of size {list(a_sizes)} and at {list(b)} of size {list(b_sizes)} overlap"
    covered, wanted = sum(prod(sizes) for _, sizes in full), prod(shape)
    if covered != wanted:
        return f"{_missing(shape, full)}only {covered:,} of {wanted:,} elements are saved"
    return None


def check(name: str, shape: tuple[int, ...], boxes: Sequence[Box], source: str) -> None:
    """Raises `FormatError` unless `boxes` tile `shape`."""
    if fault := find_fault(shape, boxes):
        raise FormatError(
            f"{source}: tensor {name!r} of shape {list(shape)} is not whole: {fault}",
            hint="a file of the checkpoint is missing, or the job that saved it did not finish",
        )


def _find_overlap(boxes: Sequence[Box], dimensions: int) -> tuple[Box, Box] | None:
    if len(boxes) < 2:
        return None
    if not dimensions:
        return boxes[0], boxes[1]
    sweep = max(range(dimensions), key=lambda d: len({offsets[d] for offsets, _ in boxes}))
    active: list[Box] = []
    left = _NEIGHBOURS * (len(boxes) + 64)
    for box in sorted(boxes, key=lambda b: b[0][sweep]):
        active = [other for other in active if other[0][sweep] + other[1][sweep] > box[0][sweep]]
        left -= len(active)
        if left < 0:
            raise _Tangle
        for other in active:
            if all(a < b + m and b < a + n for a, n, b, m in zip(*other, *box, strict=True)):
                return other, box
        active.append(box)
    return None


def _missing(shape: tuple[int, ...], boxes: Sequence[Box]) -> str:
    """The first missing range when the tensor is cut along one dimension only, otherwise nothing."""
    cut = {d for _, sizes in boxes for d, n in enumerate(sizes) if n != shape[d]}
    if not boxes or len(cut) != 1:
        return ""
    (dim,) = cut
    position = 0
    for offsets, sizes in sorted(boxes, key=lambda b: b[0][dim]):
        if offsets[dim] > position:
            break
        position = offsets[dim] + sizes[dim]
    end = min((o[dim] for o, _ in boxes if o[dim] >= position), default=shape[dim])
    return f"indices {position:,} to {end:,} of dimension {dim} are in no file; "
