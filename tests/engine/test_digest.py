"""Segments: whole rows, equal parts, every item once."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.engine.digest import segments


@given(st.lists(st.integers(0, 12), max_size=4), st.integers(1, 50))
def test_segments_follow_each_other_and_hold_every_item(shape: list[int], most: int) -> None:
    found = list(segments(shape, most))
    assert [low for low, _ in found] == [0, *(high for _, high in found[:-1])]
    assert found[-1][1] == prod(shape)
    assert all(high - low <= most for low, high in found)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), [(0, 1)]),
        ((0, 5), [(0, 0)]),
        ((4, 3), [(0, 6), (6, 12)]),
        ((2, 3, 4), [(0, 8), (8, 12), (12, 20), (20, 24)]),
        ((2, 20), [(0, 10), (10, 20), (20, 30), (30, 40)]),
    ],
)
def test_segments_of_at_most_10_items(shape: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert list(segments(shape, 10)) == expected
