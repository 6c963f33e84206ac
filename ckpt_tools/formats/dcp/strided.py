"""Repairs the description of shards that DTensor's `_StridedShard` placement cuts out of a tensor.

A `_StridedShard` shard is several slices of a dimension laid end to end (rows 0, 1, 4, 5 of eight over two ranks with
split factor 2), and DCP describes it as one chunk that starts at the first of them and is as long as all of them
together. Those descriptions overlap, so they can be told from honest ones; when the slices are of one size, offsets
and sizes determine them. FSDP2 over tensor or expert parallelism on the same dimension gives shards that are
contiguous after all, and they are described rightly. See transformers' `distributed/checkpoint.py` for the background.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckpt_tools.formats.tiling import Box, find_fault


def true_boxes(shape: tuple[int, ...], boxes: Sequence[Box]) -> tuple[int, dict[Box, tuple[Box, ...]]] | None:
    """The slices that each described chunk really holds, in the order in which they lie in it.

    Args:
        shape: of the whole tensor.
        boxes: as described; they do not tile the shape.

    Returns:
        the dimension that is cut into slices and, for each described box, its true boxes; None when the description
        is not that of an evenly cut `_StridedShard`.
    """
    for dim in range(len(shape)):
        spans = sorted({(offsets[dim], sizes[dim]) for offsets, sizes in boxes})
        pieces = _pieces(shape[dim], spans)
        if pieces is None:
            continue
        repaired = {(offsets, sizes): _cut(dim, offsets, sizes, pieces[offsets[dim]]) for offsets, sizes in boxes}
        if find_fault(shape, [box for parts in repaired.values() for box in parts]) is None:
            return dim, repaired
    return None


def _pieces(extent: int, spans: Sequence[tuple[int, int]]) -> dict[int, tuple[range, int]] | None:
    """By described offset: the starts of the slices, and their length.

    With `count` interleaved shards of `size` indices in slices of `width`, shard `i` of group `g` is described at
    `g * count * size + i * width` and its slices repeat every `count * width` indices.
    """
    offsets = [offset for offset, _ in spans]
    sizes = {size for _, size in spans}
    if len(offsets) < 2 or offsets[0] != 0 or len(sizes) != 1:
        return None
    (size,) = sizes
    width = offsets[1] - offsets[0]
    if not 0 < width < size or size % width:
        return None
    count = next((i for i, offset in enumerate(offsets) if offset != i * width), len(offsets))
    period = count * size
    if len(offsets) % count or period * (len(offsets) // count) != extent:
        return None
    if any(offset != (i // count) * period + (i % count) * width for i, offset in enumerate(offsets)):
        return None
    return {offset: (range(offset, offset + count * size, count * width), width) for offset in offsets}


def _cut(dim: int, offsets: tuple[int, ...], sizes: tuple[int, ...], pieces: tuple[range, int]) -> tuple[Box, ...]:
    starts, width = pieces
    narrow = (*sizes[:dim], width, *sizes[dim + 1 :])
    return tuple(((*offsets[:dim], start, *offsets[dim + 1 :]), narrow) for start in starts[: sizes[dim] // width])
