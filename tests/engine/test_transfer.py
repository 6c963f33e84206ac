"""Gathering and scattering strided extents through windows, against numpy, at every window boundary."""

from __future__ import annotations

import itertools
import math
import operator
import random
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from ckpt_tools.engine import transfer
from ckpt_tools.engine.extents import Extent, extent
from ckpt_tools.engine.files import MemoryFiles
from ckpt_tools.engine.memory import leaf_ranges
from ckpt_tools.engine.transfer import Window, gather, scatter


@st.composite
def placements(draw: st.DrawFn) -> tuple[Extent, int, int, int]:
    """An extent that maps a whole box of a leaf to a permuted, padded box of a file, and its sizes."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    leaf_strides, total = [], 1
    for n in reversed(shape):
        leaf_strides.insert(0, total)
        total *= n
    file_strides, reach = [0] * len(shape), draw(st.integers(1, 2))
    for dim in draw(st.permutations(range(len(shape)))):
        file_strides[dim] = reach
        reach *= shape[dim] + draw(st.integers(0, 6))
    start = draw(st.integers(0, 3)) * itemsize
    made = extent("f", start, 0, shape, tuple(leaf_strides), tuple(file_strides))
    return (
        made,
        total,
        itemsize,
        start // itemsize + 1 + sum((n - 1) * s for n, s in zip(shape, file_strides, strict=True)),
    )


@given(placements(), st.integers(1, 40))
def test_windows_of_any_size_gather_what_numpy_reads_and_scatter_it_back(
    case: tuple[Extent, int, int, int], step: int
) -> None:
    part, total, itemsize, length = case
    rng = np.random.default_rng(0)
    file = rng.integers(0, 255, length * itemsize, dtype=np.uint8)
    items = file.view(f"u{itemsize}")
    source = as_strided(items[part.position // itemsize :], part.sizes, tuple(s * itemsize for s in part.file_strides))
    expected = np.empty(total, items.dtype)
    as_strided(expected, part.sizes, tuple(s * itemsize for s in part.leaf_strides))[...] = source

    back = np.zeros_like(file)
    read, written = MemoryFiles([("f", memoryview(file))]), MemoryFiles([("f", memoryview(back))])
    for low in range(0, total, step):
        high = min(low + step, total)
        window = Window(memoryview(bytearray((high - low) * itemsize)), low, high, itemsize)
        gather([part], window, read)
        assert bytes(window.data) == expected[low:high].tobytes()
        scatter([part], window, written)
    again = as_strided(
        back.view(items.dtype)[part.position // itemsize :], part.sizes, tuple(s * itemsize for s in part.file_strides)
    )
    assert np.array_equal(again, source)
    assert np.count_nonzero(back) <= np.count_nonzero(source.view(np.uint8) if source.flags.c_contiguous else file)


@given(placements(), st.integers(0, 6))
def test_leaf_ranges_hold_the_elements_of_an_extent_and_others_only_in_small_gaps(
    case: tuple[Extent, int, int, int], gap: int
) -> None:
    part, _, _, _ = case
    sparse = Extent("f", 0, 5, part.sizes, part.file_strides, part.leaf_strides)  # walk the leaf as the file was
    order = sorted(range(len(sparse.sizes)), key=lambda i: -sparse.leaf_strides[i])
    sparse = Extent(
        "f", 0, 5, *(tuple(t[i] for i in order) for t in (sparse.sizes, sparse.leaf_strides, sparse.file_strides))
    )
    offsets = np.zeros((), dtype=np.int64)
    for n, s in zip(sparse.sizes, sparse.leaf_strides, strict=True):
        offsets = offsets[..., None] + np.arange(n) * s
    expected = sorted(int(o) + 5 for o in offsets.reshape(-1))
    assert sorted(i for low, high in leaf_ranges(sparse) for i in range(low, high)) == expected
    wider = sorted(i for low, high in leaf_ranges(sparse, gap) for i in range(low, high))
    assert set(expected) <= set(wider)
    assert len(wider) - len(expected) <= gap * len(expected)


def test_a_transposed_region_is_read_and_written_by_whole_runs() -> None:
    # [3, 4, 2] in the leaf; in the file [2, 4, 3] with rows of 5: two loops lead to runs of 3.
    part = Extent("f", 0, 0, (3, 4, 2), (8, 2, 1), (1, 5, 20))
    leaf = np.arange(24, dtype=np.uint16)
    calls: list[tuple[int, int]] = []

    class File:
        data = bytearray(2 * 40)

        def read(self, file: str, position: int, into: memoryview) -> None:  # noqa: ARG002
            into[:] = self.data[position : position + len(into)]

        def write(self, file: str, position: int, data: memoryview) -> None:  # noqa: ARG002
            calls.append((position, len(data)))
            self.data[position : position + len(data)] = data

    file = File()
    scatter([part], Window(memoryview(leaf).cast("B"), 0, 24, 2), file)
    assert calls == [(2 * (20 * a + 5 * b), 6) for a in range(2) for b in range(4)]
    stored = np.frombuffer(file.data, np.uint16).reshape(2, 4, 5)[..., :3]
    assert np.array_equal(stored, leaf.reshape(3, 4, 2).transpose(2, 1, 0))
    back = memoryview(bytearray(48))
    gather([part], Window(back, 0, 24, 2), file)
    assert np.array_equal(np.frombuffer(back, np.uint16), leaf)


@given(
    st.lists(st.integers(1, 11), min_size=2, max_size=3),
    st.randoms(use_true_random=False),
    st.sampled_from([1, 2, 4, 8]),
)
def test_tiles_transpose_arrays_of_any_order_and_size(shape: list[int], order: random.Random, itemsize: int) -> None:
    """Small tiles, so that arrays of a few items have many of them, whole and cut."""
    dims = list(range(len(shape)))
    order.shuffle(dims)
    source = np.arange(math.prod(shape)).astype(f"u{itemsize}").reshape(shape)
    memory = np.empty([shape[dim] for dim in dims], source.dtype)
    target = memory.transpose(np.argsort(dims))
    with mock.patch.object(transfer, "_TILE", (5, 3 * itemsize)):
        transfer._transpose(source, target)
    assert np.array_equal(target, source)


@given(placements(), st.integers(1, 60))
def test_pieces_of_an_extent_are_small_and_hold_each_of_its_elements_once(
    case: tuple[Extent, int, int, int], items: int
) -> None:
    part, _, itemsize, _ = case

    def elements(extent: Extent) -> list[tuple[int, int]]:
        steps = itertools.product(*map(range, extent.sizes))
        return [
            (
                extent.position + itemsize * sum(map(operator.mul, step, extent.file_strides)),
                extent.leaf_start + sum(map(operator.mul, step, extent.leaf_strides)),
            )
            for step in steps
        ]

    pieces = list(part.pieces(items, itemsize))
    assert max(piece.numel for piece in pieces) <= items
    assert sorted(e for piece in pieces for e in elements(piece)) == sorted(elements(part))
