"""Digests of tensors that travel with them: xxh3-128 over segments, so that threads work independently.

The bytes of a leaf (row-major, as stored) are cut into segments of at most `SEGMENT` bytes. A leaf of one segment has
the xxh3-128 of its bytes; a longer one the xxh3-128 of its segments' 16-byte digests, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import xxhash

SEGMENT = 32 << 20
"""Bytes of a segment, the unit of work of a thread and of resuming."""

ALGORITHM = "xxh3-128/32MiB"


def segments(shape: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) items of each segment of a tensor of this shape; an empty tensor has one empty segment.

    The first dimension whose slices have at most `most` items is cut into the fewest equal parts, the last one
    shorter; the dimensions before it are cut into single indices. A matrix is then moved by whole rows, never by parts
    of two, which is what makes transposing it possible in long runs.
    """
    shape = shape or (1,)
    if not prod(shape):
        yield 0, 0
        return
    dim, inner = 0, prod(shape[1:])
    while inner > most:
        dim += 1
        inner = prod(shape[dim + 1 :])
    block = shape[dim] * inner
    parts = -(-shape[dim] // (most // inner))
    step = -(-shape[dim] // parts) * inner
    for start in range(0, prod(shape), block):
        for low in range(start, start + block, step):
            yield low, min(low + step, start + block)


def combine(segments: Sequence[bytes]) -> str:
    """The digest of a leaf from those of its segments, in order, as hexadecimal text."""
    if len(segments) == 1:
        return segments[0].hex()
    return xxhash.xxh3_128_hexdigest(b"".join(segments))
