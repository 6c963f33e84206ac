"""Where the elements of each leaf lie in the files of a store, as strided extents.

This is the one description that copying, verifying and proving work on. It is derived from the layout's views and the
store's chunks, in either direction and for any sharding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.tensors import Chunk, StoredTensor, row_major
from ckpt_tools.layouts.algebra import Box, Piece, View, cut, restrict
from ckpt_tools.layouts.layout import NativeTensor


class Extent(NamedTuple):
    """Elements of a leaf that lie in one file. Loops are ordered by leaf stride, largest first.

    Attributes:
        file: path relative to the store's root.
        position: byte position in the file of the first element.
        leaf_start: position in the leaf of the first element, in elements.
        sizes: steps of each loop.
        leaf_strides: elements of the leaf from one step to the next.
        file_strides: elements of the file from one step to the next.
    """

    file: str
    position: int
    leaf_start: int
    sizes: tuple[int, ...]
    leaf_strides: tuple[int, ...]
    file_strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    @property
    def is_contiguous(self) -> bool:
        """One run of neighbouring elements, in the leaf and in the file."""
        return len(self.sizes) == 1 and self.leaf_strides == (1,) and self.file_strides == (1,)

    @property
    def is_transposed(self) -> bool:
        """Neighbours in the leaf are not neighbours in the file."""
        nearest = self.file_strides[-1]
        return nearest != 1 and (self.leaf_strides[-1] == 1 or nearest > min(self.file_strides))

    def within(self, low: int, high: int, itemsize: int) -> Iterator[Extent]:
        """The parts of the extent whose leaf positions lie in `[low, high)`."""
        if self.is_contiguous:
            first, last = max(low, self.leaf_start), min(high, self.leaf_start + self.sizes[0])
            if first < last:
                position = self.position + (first - self.leaf_start) * itemsize
                yield Extent(self.file, position, first, (last - first,), (1,), (1,))
            return
        for box in cut(self.leaf_start, self.sizes, self.leaf_strides, low, high):
            yield self._part(box, itemsize)

    def pieces(self, items: int, itemsize: int) -> Iterator[Extent]:
        """The extent in parts of at most `items` elements, cut across its longest loop but for the runs of the file."""
        if self.numel <= items:
            yield self
            return
        run = min(range(len(self.sizes)), key=lambda loop: self.file_strides[loop])
        loop = max(range(len(self.sizes)), key=lambda loop: (loop != run and self.sizes[loop] > 1, self.sizes[loop]))
        step = max(1, self.sizes[loop] * items // self.numel)
        for first in range(0, self.sizes[loop], step):
            box = [(0, size) for size in self.sizes]
            box[loop] = (first, min(step, self.sizes[loop] - first))
            yield from self._part(tuple(box), itemsize).pieces(items, itemsize)

    def _part(self, box: Box, itemsize: int) -> Extent:
        firsts = [first for first, _ in box]
        return extent(
            self.file,
            self.position + itemsize * sum(f * s for f, s in zip(firsts, self.file_strides, strict=True)),
            self.leaf_start + sum(f * s for f, s in zip(firsts, self.leaf_strides, strict=True)),
            [count for _, count in box],
            self.leaf_strides,
            self.file_strides,
        )


def extent(
    file: str,
    position: int,
    leaf_start: int,
    sizes: list[int],
    leaf_strides: tuple[int, ...],
    file_strides: tuple[int, ...],
) -> Extent:
    """An extent with loops of one step removed and neighbouring loops merged where both sides allow."""
    return Extent(file, position, leaf_start, *_merged(sizes, leaf_strides, file_strides))


def _merged(
    sizes: Sequence[int], leaf_strides: Sequence[int], file_strides: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes, leaf strides and file strides of the fewest loops, largest leaf stride first."""
    loops = sorted(
        ((ls, fs, n) for n, ls, fs in zip(sizes, leaf_strides, file_strides, strict=True) if n != 1), reverse=True
    )
    merged: list[tuple[int, int, int]] = []
    for ls, fs, n in loops:
        if merged and merged[-1][0] == n * ls and merged[-1][1] == n * fs:
            merged[-1] = (ls, fs, merged[-1][2] * n)
        else:
            merged.append((ls, fs, n))
    if not merged:
        merged = [(1, 1, 1)]
    return tuple(n for _, _, n in merged), tuple(ls for ls, _, _ in merged), tuple(fs for _, fs, _ in merged)


def addressable(dtype: DType, numel: int) -> tuple[int, int]:
    """(item size in bytes, number of items) of a tensor: packed types narrower than a byte are moved as bytes."""
    return (1, dtype.nbytes(numel)) if dtype.bits % 8 else (dtype.itemsize, numel)


def items_of(dtype: DType, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor in items: packed types narrower than a byte are one row of bytes."""
    return (dtype.nbytes(prod(shape)),) if dtype.bits % 8 else shape


def leaf_extents(tensor: StoredTensor) -> list[Extent]:
    """Extents of a tensor that is itself a leaf."""
    _, items = addressable(tensor.dtype, tensor.numel)
    if not items:
        return []
    whole = len(tensor.chunks) == 1 and tensor.chunks[0].sizes == tensor.shape
    if whole and tensor.chunks[0].strides is None:
        chunk = tensor.chunks[0]
        return [Extent(chunk.file, chunk.position, 0, (items,), (1,), (1,))]
    strides = row_major(tensor.shape)
    found = []
    for chunk in tensor.chunks:
        if chunk.numel:
            start = sum(o * s for o, s in zip(chunk.offsets, strides, strict=True))
            own = chunk.strides or row_major(chunk.sizes)
            found.append(extent(chunk.file, chunk.position, start, list(chunk.sizes), strides, own))
    return found


_Part = tuple[int, int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""An extent without its place: number of the leaf, bytes from the chunk's position, then the fields of `Extent`."""


class NativeExtents:
    """Extents of native tensors. Tensors that share a pattern are cut once: their extents differ in names and files."""

    def __init__(self) -> None:
        self._indices: dict[int, _PieceIndex] = {}
        self._parts: dict[object, tuple[_Part, ...]] = {}

    def of(self, tensor: StoredTensor, native: NativeTensor) -> Iterator[tuple[str, Extent]]:
        """(leaf, extent) of every piece of a native tensor, in each of its chunks."""
        pattern, leaves, itemsize = native.pattern, native.leaves, tensor.dtype.itemsize
        for chunk in tensor.chunks:
            key = id(pattern), itemsize, chunk.offsets, chunk.sizes, chunk.strides
            parts = self._parts.get(key)
            if parts is None:
                parts = self._parts[key] = tuple(self._cut(pattern, chunk, itemsize))
            file, position = chunk.file, chunk.position
            for leaf, distance, start, sizes, leaf_strides, file_strides in parts:
                yield leaves[leaf], Extent(file, position + distance, start, sizes, leaf_strides, file_strides)

    def _cut(self, pattern: View, chunk: Chunk, itemsize: int) -> Iterator[_Part]:
        # The index holds the pattern, so that its id stays its own.
        index = self._indices.get(id(pattern))
        if index is None:
            index = self._indices[id(pattern)] = _PieceIndex(pattern)
        strides = chunk.strides or row_major(chunk.sizes)
        whole = chunk.sizes == pattern.shape
        for number, piece in index.pieces if whole else index.near(chunk):
            for part in (piece,) if whole else restrict(piece, chunk.offsets, chunk.sizes):
                first = sum(s * stride for s, stride in zip(part.starts, strides, strict=True))
                sizes, leaf_strides, file_strides = _merged(
                    [loop.size for loop in part.loops],
                    [loop.leaf_stride for loop in part.loops],
                    [loop.step * strides[loop.dim] for loop in part.loops],
                )
                yield number, first * itemsize, part.leaf_start, sizes, leaf_strides, file_strides


class _PieceIndex:
    """Pieces of a view by their range of dimension 0, so that a chunk meets only the pieces near it.

    Each comes with the number of its leaf among the view's.
    """

    def __init__(self, view: View) -> None:
        numbers = {leaf: number for number, leaf in enumerate(view.leaves)}
        self.view = view
        self.pieces = [(numbers[piece.leaf], piece) for piece in view.pieces]
        ranged = []
        for number, piece in self.pieces:
            low = piece.starts[0] if piece.starts else 0
            reach = sum((loop.size - 1) * loop.step for loop in piece.loops if loop.dim == 0)
            ranged.append((low, low + reach, (number, piece)))
        ranged.sort(key=lambda r: r[0])
        self._lows = [low for low, _, _ in ranged]
        self._ranged = ranged
        self._reach = max((high - low for low, high, _ in ranged), default=0)

    def near(self, chunk: Chunk) -> Iterator[tuple[int, Piece]]:
        if not chunk.offsets:
            yield from self.pieces
            return
        low, high = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
        first, last = bisect_left(self._lows, low - self._reach), bisect_left(self._lows, high)
        yield from (piece for _, reach, piece in self._ranged[first:last] if reach >= low)
