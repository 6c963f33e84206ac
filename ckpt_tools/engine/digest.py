"""Digests of tensors that travel with them: xxh3-128 over segments, so that threads work independently.

The bytes of a leaf (row-major, as stored) are cut into segments of `SEGMENT` bytes. A leaf of one segment has the
xxh3-128 of its bytes; a longer one the xxh3-128 of its segments' 16-byte digests, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

SEGMENT = 8 << 20
"""Bytes of a segment, the unit of work of a thread and of resuming."""

ALGORITHM = "xxh3-128/8MiB"


def combine(segments: Sequence[bytes]) -> str:
    """The digest of a leaf from those of its segments, in order, as hexadecimal text."""
    if len(segments) == 1:
        return segments[0].hex()
    return xxhash.xxh3_128_hexdigest(b"".join(segments))
