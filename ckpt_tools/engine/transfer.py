"""Moves one range of a leaf between extents and a buffer: the only code that touches tensor bytes.

Runs that are contiguous on both sides go straight between the file and the buffer. Strided ones pass through a scratch
array in file order: dense regions with one read or write, sparse ones loop by loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ckpt_tools.core.scratch import scratch
from ckpt_tools.engine.extents import Extent, extent

WASTE = 4
"""A strided region is read whole when that costs at most this many times the bytes that are wanted."""


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


def _gather_strided(part: Extent, window: Window, reader: Reader) -> None:
    import numpy as np

    reach = _file_reach(part)
    if reach > WASTE * part.numel:
        _each_outer(part, window.itemsize, lambda inner: gather((inner,), window, reader))
        return
    data = scratch("strided", reach * window.itemsize)
    reader.read(part.file, part.position, data)
    items = np.frombuffer(data, _item(window.itemsize))
    _leaf_view(part, window)[...] = _strided(items, 0, part.sizes, part.file_strides)


def _scatter_strided(part: Extent, window: Window, writer: Writer) -> None:
    import numpy as np

    reach = _file_reach(part)
    if reach != part.numel:
        _each_outer(part, window.itemsize, lambda inner: scatter((inner,), window, writer))
        return
    data = scratch("strided", reach * window.itemsize)
    items = np.frombuffer(data, _item(window.itemsize))
    _strided(items, 0, part.sizes, part.file_strides)[...] = _leaf_view(part, window)
    writer.write(part.file, part.position, data)


def _file_reach(part: Extent) -> int:
    """Items of the file from the first to the last one of the extent."""
    return 1 + sum((n - 1) * s for n, s in zip(part.sizes, part.file_strides, strict=True))


def _each_outer(part: Extent, itemsize: int, act: Callable[[Extent], None]) -> None:
    """Calls `act` for each step of the loop with the largest file stride."""
    outer = max(range(len(part.sizes)), key=lambda i: part.file_strides[i])
    rest = [i for i in range(len(part.sizes)) if i != outer]
    for step in range(part.sizes[outer]):
        act(
            extent(
                part.file,
                part.position + step * part.file_strides[outer] * itemsize,
                part.leaf_start + step * part.leaf_strides[outer],
                [part.sizes[i] for i in rest],
                tuple(part.leaf_strides[i] for i in rest),
                tuple(part.file_strides[i] for i in rest),
            )
        )


def _leaf_view(part: Extent, window: Window):  # type: ignore[no-untyped-def]
    import numpy as np

    items = np.frombuffer(window.data, _item(window.itemsize))
    return _strided(items, part.leaf_start - window.low, part.sizes, part.leaf_strides)


def _strided(items, start: int, sizes: tuple[int, ...], strides: tuple[int, ...]):  # type: ignore[no-untyped-def]
    from numpy.lib.stride_tricks import as_strided

    return as_strided(items[start:], sizes, tuple(s * items.itemsize for s in strides))


def _item(itemsize: int) -> str:
    return f"u{itemsize}"
