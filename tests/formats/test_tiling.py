"""Tilings: random cuts are accepted, and every fault that a lost or repeated piece makes is found."""

from __future__ import annotations

import time
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools.core.errors import FormatError
from ckpt_tools.formats.tiling import Box, check, find_fault


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape cut into boxes by random halvings, some of them empty."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8))):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[dim]))
        for start, length in ((0, cut), (cut, sizes[dim] - cut)):
            moved = (*offsets[:dim], offsets[dim] + start, *offsets[dim + 1 :])
            boxes.append((moved, (*sizes[:dim], length, *sizes[dim + 1 :])))
    return shape, draw(st.permutations(boxes))


@settings(max_examples=200, deadline=None)
@given(tilings(), st.data())
def test_cuts_are_whole_until_a_piece_is_lost_repeated_or_moved(
    tiling: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = tiling
    assert find_fault(shape, boxes) is None
    full = [i for i, (_, sizes) in enumerate(boxes) if prod(sizes)]
    chosen = data.draw(st.sampled_from(full))
    offsets, sizes = boxes[chosen]
    assert "elements are saved" in str(find_fault(shape, [b for i, b in enumerate(boxes) if i != chosen]))
    assert "overlap" in str(find_fault(shape, [*boxes, boxes[chosen]]))
    moved = (tuple(o + 1 for o in offsets), sizes)
    assert find_fault(shape, [moved if i == chosen else b for i, b in enumerate(boxes)]) is not None


def test_the_missing_range_is_named() -> None:
    with pytest.raises(FormatError, match=r"x: tensor 'w' .* indices 2 to 5 of dimension 0 are in no file"):
        check("w", (6, 4), [((0, 0), (2, 4)), ((5, 0), (1, 4))], "x")


def test_scalars_and_tensors_without_elements() -> None:
    assert find_fault((), [((), ())]) is None
    assert "overlap" in str(find_fault((), [((), ()), ((), ())]))
    assert "only 0 of 1" in str(find_fault((), []))
    assert find_fault((0, 4), []) is None
    assert find_fault((0, 4), [((0, 0), (0, 4)), ((0, 0), (0, 4))]) is None


@pytest.mark.parametrize("boxes", [[((0,), (4,))], [((0, 0, 0), (4, 4, 1))], [((-1, 0), (4, 4))], [((0, 0), (4, 5))]])
def test_pieces_of_another_tensor_are_named(boxes: list[Box]) -> None:
    assert find_fault((4, 4), boxes) is not None


def test_a_grid_of_4096_pieces_is_checked_fast() -> None:
    boxes: list[Box] = [((8 * i, 8 * j), (8, 8)) for i in range(64) for j in range(64)]
    started = time.process_time()
    assert find_fault((512, 512), boxes) is None
    assert time.process_time() - started < 2
