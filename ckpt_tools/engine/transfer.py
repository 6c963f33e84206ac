"""Moves one range of a leaf between extents and a buffer: the only code that touches tensor bytes.

Runs that are contiguous on both sides go straight between the file and the buffer. Strided ones pass through a scratch
array in file order, which is read or written region by region.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Protocol

from ckpt_tools.core.scratch import scratch
from ckpt_tools.engine.extents import Extent

WASTE = 4
"""A strided region is read whole when that costs at most this many times the bytes that are wanted."""
PIECE = 1 << 20
"""Bytes of a strided extent that are moved at once; memory is bounded by this and `WASTE`, and by the window."""
_TILE = (256, 512)
"""Rows, and bytes of a row, of the tiles that are transposed: they stay in the second level cache."""
_LINE = 64


class Reader(Protocol):
    """Where leaves come from."""

    def read(self, file: str, position: int, into: memoryview) -> None:
        """Fills `into` with the bytes of `file` from `position` on; raises `StorageError` when it cannot."""


class Writer(Protocol):
    """Where leaves go to."""

    def write(self, file: str, position: int, data: memoryview) -> None:
        """Writes all of `data`; raises `StorageError` when it cannot."""


@dataclass(frozen=True, slots=True)
class Window:
    """Items `[low, high)` of a leaf, in memory, row-major.

    Attributes:
        data: the bytes of the range.
        low: first item.
        high: last item + 1.
        itemsize: bytes of one item.
    """

    data: memoryview
    low: int
    high: int
    itemsize: int

    def run(self, start: int, items: int) -> memoryview:
        """The bytes of `items` items from item `start` of the leaf on."""
        begin = (start - self.low) * self.itemsize
        return self.data[begin : begin + items * self.itemsize]


def gather(extents: Iterable[Extent], window: Window, reader: Reader) -> None:
    """Fills the window from the extents."""
    for part in _overlap(extents, window):
        if part.is_contiguous:
            reader.read(part.file, part.position, window.run(part.leaf_start, part.sizes[0]))
        else:
            _gather_strided(part, window, reader)


def scatter(extents: Iterable[Extent], window: Window, writer: Writer) -> None:
    """Writes the window to the extents."""
    for part in _overlap(extents, window):
        if part.is_contiguous:
            writer.write(part.file, part.position, window.run(part.leaf_start, part.sizes[0]))
        else:
            _scatter_strided(part, window, writer)


def equal(a: memoryview, b: memoryview) -> bool:
    """Whether two buffers hold the same bytes; `==` of memoryviews goes byte by byte, thirty times as slow."""
    import numpy as np

    return np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))


def _overlap(extents: Iterable[Extent], window: Window) -> Iterator[Extent]:
    for whole in extents:
        if whole.leaf_start >= window.high:
            return
        yield from whole.within(window.low, window.high, window.itemsize)


def _gather_strided(whole: Extent, window: Window, reader: Reader) -> None:
    for part in whole.pieces(PIECE // window.itemsize, window.itemsize):
        regions = _Regions.of(part, WASTE)
        if regions.are_runs:
            for position, start in regions.places(part, window.itemsize):
                reader.read(part.file, position, window.run(start, regions.reach))
            continue
        data = scratch("strided", regions.items * window.itemsize)
        for number, (position, _) in enumerate(regions.places(part, window.itemsize)):
            reader.read(part.file, position, regions.run(data, number, window.itemsize))
        _transpose(regions.view(data, part, window.itemsize), _leaf_view(part, window))


def _scatter_strided(whole: Extent, window: Window, writer: Writer) -> None:
    for part in whole.pieces(PIECE // window.itemsize, window.itemsize):
        regions = _Regions.of(part, 1)
        if regions.are_runs:
            for position, start in regions.places(part, window.itemsize):
                writer.write(part.file, position, window.run(start, regions.reach))
            continue
        data = scratch("strided", regions.items * window.itemsize)
        _transpose(_leaf_view(part, window), regions.view(data, part, window.itemsize))
        for number, (position, _) in enumerate(regions.places(part, window.itemsize)):
            writer.write(part.file, position, regions.run(data, number, window.itemsize))


@dataclass(frozen=True, slots=True)
class _Regions:
    """The regions of a file that a strided extent touches, each read or written at once, one after another in memory.

    Attributes:
        loops: of the extent, those that lead from region to region, largest file stride first.
        count: regions.
        reach: items of a region, from the first wanted one to the last.
        strides: of all loops of the extent in that memory.
        are_runs: a region is a run of the leaf, too, and needs no memory between.
    """

    loops: tuple[int, ...]
    count: int
    reach: int
    strides: tuple[int, ...]
    are_runs: bool

    @classmethod
    def of(cls, part: Extent, waste: int) -> _Regions:
        """The largest regions of which at least one item in `waste` is wanted."""
        order = sorted(range(len(part.sizes)), key=lambda loop: -part.file_strides[loop])
        for outer in range(len(order) + 1):
            inner = order[outer:]
            reach = 1 + sum((part.sizes[i] - 1) * part.file_strides[i] for i in inner)
            if reach <= waste * prod(part.sizes[i] for i in inner):
                break
        strides, step = list(part.file_strides), reach
        for loop in reversed(order[:outer]):
            strides[loop], step = step, step * part.sizes[loop]
        are_runs = all(part.leaf_strides[i] == part.file_strides[i] == 1 for i in inner)
        return cls(tuple(order[:outer]), step // reach, reach, tuple(strides), are_runs)

    @property
    def items(self) -> int:
        return self.count * self.reach

    def places(self, part: Extent, itemsize: int) -> Iterator[tuple[int, int]]:
        """(byte position in the file, first item of the leaf) of each region."""
        sizes = [part.sizes[loop] for loop in self.loops]
        far = _addresses(part.position, sizes, [part.file_strides[loop] * itemsize for loop in self.loops])
        deep = _addresses(part.leaf_start, sizes, [part.leaf_strides[loop] for loop in self.loops])
        return zip(far, deep, strict=True)

    def run(self, data: memoryview, number: int, itemsize: int) -> memoryview:
        """The bytes of one region in memory."""
        return data[number * self.reach * itemsize : (number + 1) * self.reach * itemsize]

    def view(self, data: memoryview, part: Extent, itemsize: int):  # type: ignore[no-untyped-def]
        """The extent's items in that memory, one dimension for each of its loops."""
        import numpy as np

        return _strided(np.frombuffer(data, _item(itemsize)), 0, part.sizes, self.strides)


def _addresses(start: int, sizes: list[int], strides: list[int]) -> list[int]:
    """`start + sum(i * stride)` for all steps of a nest, the last loop fastest."""
    found = [start]
    for size, stride in zip(sizes, strides, strict=True):
        found = [base + step for base in found for step in range(0, size * stride, stride)]
    return found


def _transpose(source, target) -> None:  # type: ignore[no-untyped-def]
    """target[...] = source for views whose memory orders differ.

    Each tile passes through a small copy whose rows, runs of the source, are an odd number of cache lines apart: rows
    of a power of two bytes would fight for the same few places in the cache.
    """
    import numpy as np

    dims = range(source.ndim)
    along = sorted(dims, key=lambda dim: source.strides[dim])
    across = sorted(dims, key=lambda dim: target.strides[dim])
    if along[0] == across[0]:
        target[...] = source
        return
    sizes, strides = [1] * source.ndim, [0] * source.ndim
    columns, rows = [dim for dim in along if dim != across[0]], [across[0]]
    _fill(columns, _TILE[1] // source.itemsize, source.itemsize, source.shape, sizes, strides)
    rows += [dim for dim in across if not strides[dim] and dim not in rows]
    _fill(rows, _TILE[0], _TILE[1] + _LINE, source.shape, sizes, strides)
    whole = np.ndarray(sizes, source.dtype, scratch("tile", _TILE[0] * (_TILE[1] + _LINE)), 0, strides)
    for corner in product(*(range(0, n, size) for n, size in zip(source.shape, sizes, strict=True))):
        part = tuple(slice(first, first + size) for first, size in zip(corner, sizes, strict=True))
        piece = source[part]
        tile = whole[tuple(map(slice, piece.shape))]
        tile[...] = piece
        target[part] = tile


def _fill(
    dims: Sequence[int], room: int, step: int, shape: tuple[int, ...], sizes: list[int], strides: list[int]
) -> None:
    """Lays dimensions one inside the other, the first one innermost, until `room` steps of `step` bytes are used."""
    for dim in dims:
        if room < 2:
            return
        sizes[dim], strides[dim] = min(shape[dim], room), step
        room, step = room // sizes[dim], step * sizes[dim]


def _leaf_view(part: Extent, window: Window):  # type: ignore[no-untyped-def]
    import numpy as np

    items = np.frombuffer(window.data, _item(window.itemsize))
    return _strided(items, part.leaf_start - window.low, part.sizes, part.leaf_strides)


def _strided(items, start: int, sizes: tuple[int, ...], strides: tuple[int, ...]):  # type: ignore[no-untyped-def]
    from numpy.lib.stride_tricks import as_strided

    return as_strided(items[start:], sizes, tuple(s * items.itemsize for s in strides))


def _item(itemsize: int) -> str:
    return f"u{itemsize}"
