"""Every operation of the algebra against numpy, forward and backward, and the boxes that it cuts into."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from ckpt_tools.core.errors import LayoutError
from ckpt_tools.core.tensors import row_major
from ckpt_tools.layouts import algebra
from ckpt_tools.layouts.algebra import View

Arrays = dict[str, np.ndarray]


def numbered(shape: tuple[int, ...], start: int) -> np.ndarray:
    return np.arange(start, start + prod(shape), dtype=np.int64).reshape(shape)


def spots(view: View, piece: algebra.Piece, leaf: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same elements of a piece as two arrays: in the leaf and in the view."""
    strides = row_major(view.shape)
    start = sum(s * stride for s, stride in zip(piece.starts, strides, strict=True))
    sizes = tuple(loop.size for loop in piece.loops)
    mine = as_strided(leaf.reshape(-1)[piece.leaf_start :], sizes, tuple(8 * loop.leaf_stride for loop in piece.loops))
    theirs = as_strided(
        out.reshape(-1)[start:], sizes, tuple(8 * loop.step * strides[loop.dim] for loop in piece.loops)
    )
    return mine, theirs


def forward(view: View, leaves: Arrays) -> np.ndarray:
    out = np.full(view.shape, -1, dtype=np.int64)
    for piece in view.pieces:
        if piece.numel:
            mine, theirs = spots(view, piece, leaves[piece.leaf], out)
            theirs[...] = mine
    return out


def backward(view: View, out: np.ndarray, leaves: Arrays) -> Arrays:
    back = {name: np.full_like(array, -2) for name, array in leaves.items()}
    for piece in view.pieces:
        if piece.numel:
            mine, theirs = spots(view, piece, back[piece.leaf], out)
            mine[...] = theirs
    return back


@st.composite
def expressions(draw: st.DrawFn) -> tuple[View, np.ndarray, Arrays]:
    """A random expression as a view, what numpy makes of it, and its leaves."""
    leaves: Arrays = {}

    def leaf(shape: tuple[int, ...]) -> tuple[View, np.ndarray]:
        name = f"leaf{len(leaves)}"
        leaves[name] = numbered(shape, 1000 * len(leaves))
        return algebra.leaf(name, shape), leaves[name]

    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    view, array = leaf(shape)
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["permute", "stack", "concat", "flatten", "unflatten", "narrow"]))
        dim = draw(st.integers(0, array.ndim - 1))
        if kind == "permute":
            order = draw(st.permutations(range(array.ndim)))
            view, array = algebra.permute(view, order), array.transpose(order)
        elif kind in ("stack", "concat") and array.size < 300:
            other, other_array = leaf(array.shape)
            pair, arrays = [view, other], [array, other_array]
            if kind == "stack":
                view, array = algebra.stack(pair, dim), np.stack(arrays, dim)
            else:
                view, array = algebra.concat(pair, dim), np.concatenate(arrays, dim)
        elif kind == "flatten" and dim + 1 < array.ndim:
            merged = array.shape[:dim] + (array.shape[dim] * array.shape[dim + 1],) + array.shape[dim + 2 :]
            view, array = algebra.flatten(view, dim), array.reshape(merged)
        elif kind == "unflatten":
            inner = draw(st.sampled_from([d for d in range(1, array.shape[dim] + 1) if array.shape[dim] % d == 0]))
            try:
                view = algebra.unflatten(view, dim, (array.shape[dim] // inner, inner))
            except LayoutError:
                continue  # a loop straddles the split, which the algebra refuses rather than gets wrong
            array = array.reshape(array.shape[:dim] + (array.shape[dim] // inner, inner) + array.shape[dim + 1 :])
        elif kind == "narrow":
            start = draw(st.integers(0, array.shape[dim] - 1))
            length = draw(st.integers(1, array.shape[dim] - start))
            view = algebra.narrow(view, dim, start, length)
            array = array.take(range(start, start + length), dim)
    return view, array, leaves


@given(expressions())
def test_a_view_filled_from_its_leaves_is_what_numpy_makes(case: tuple[View, np.ndarray, Arrays]) -> None:
    view, array, leaves = case
    assert view.shape == array.shape
    assert np.array_equal(forward(view, leaves), array)


@given(expressions())
def test_the_same_pieces_backward_restore_every_element_the_view_took(
    case: tuple[View, np.ndarray, Arrays],
) -> None:
    view, array, leaves = case
    back = backward(view, array, leaves)
    for name, values in back.items():
        taken = values != -2
        assert np.array_equal(values[taken], leaves[name][taken])
    assert sum(int((values != -2).sum()) for values in back.values()) == array.size


@given(expressions(), st.data())
def test_the_parts_of_pieces_in_a_box_are_that_box_of_the_view(
    case: tuple[View, np.ndarray, Arrays], data: st.DataObject
) -> None:
    view, array, leaves = case
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in view.shape)
    sizes = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(view.shape, offsets, strict=True))
    pieces = tuple(q for p in view.pieces for q in algebra.restrict(p, offsets, sizes))
    expected = array[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
    assert np.array_equal(forward(View(sizes, pieces), leaves), expected)


@given(
    st.integers(0, 20),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(-5, 80),
    st.integers(0, 60),
)
def test_cut_finds_each_step_of_a_nest_in_a_range_exactly_once(
    base: int, loops: list[tuple[int, int]], low: int, width: int
) -> None:
    sizes, strides = [n for n, _ in loops], [s for _, s in loops]
    found = [
        step
        for box in algebra.cut(base, sizes, strides, low, low + width)
        for step in product(*(range(first, first + count) for first, count in box))
    ]
    expected = [
        step
        for step in product(*map(range, sizes))
        if low <= base + sum(i * s for i, s in zip(step, strides, strict=True)) < low + width
    ]
    assert sorted(found) == expected


def test_shapes_that_do_not_fit_are_refused_with_both_shapes_named() -> None:
    a, b = algebra.leaf("a", (2, 3)), algebra.leaf("b", (3, 2))
    with pytest.raises(LayoutError, match=r"\(2, 3\).*\(3, 2\)"):
        algebra.stack([a, b])
    with pytest.raises(LayoutError, match=r"\(2, 3\).*\(3, 2\)"):
        algebra.concat([a, b])
    with pytest.raises(LayoutError, match="cannot be split into 2 x 2"):
        algebra.unflatten(a, 1, (2, 2))


def test_a_split_through_the_middle_of_a_run_is_refused_not_approximated() -> None:
    joined = algebra.concat([algebra.leaf("a", (3,)), algebra.leaf("b", (3,))])
    with pytest.raises(LayoutError, match="straddles"):
        algebra.unflatten(joined, 0, (3, 2))
