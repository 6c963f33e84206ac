"""The proof by generating functions: it accepts exact covers and nothing else."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import LayoutError
from ckpt_tools.core.tensors import Chunk, Framing, Store, StoredTensor
from ckpt_tools.engine.extents import extent
from ckpt_tools.engine.prove import covers, prove_chunks, prove_files

Nest = tuple[int, tuple[int, ...], tuple[int, ...]]


@st.composite
def nests(draw: st.DrawFn) -> list[Nest]:
    found = []
    for _ in range(draw(st.integers(0, 4))):
        loops = draw(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 4)), max_size=3))
        found.append((draw(st.integers(0, 12)), tuple(s for s, _ in loops), tuple(n for _, n in loops)))
    return found


def addresses(nest: Nest) -> list[int]:
    start, strides, sizes = nest
    return [start + sum(i * s for i, s in zip(step, strides, strict=True)) for step in product(*map(range, sizes))]


@given(nests(), st.integers(0, 40))
def test_covers_says_yes_exactly_when_each_address_is_visited_once(case: list[Nest], count: int) -> None:
    visited = sorted(a for nest in case for a in addresses(nest))
    assert covers(case, count) == (visited == list(range(count)))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_partition_is_accepted_and_any_single_shift_is_not(a: int, b: int, c: int, data: st.DataObject) -> None:
    # Rows of an [a, b, c] box dealt out in any order, as chunks of a sharded tensor are.
    rows = [(i * b * c + j * c, (1,), (c,)) for i in range(a) for j in range(b)]
    rows = data.draw(st.permutations(rows))
    assert covers(rows, a * b * c)
    moved = data.draw(st.integers(0, len(rows) - 1))
    start, strides, sizes = rows[moved]
    rows[moved] = (start + data.draw(st.sampled_from([-1, 1])), strides, sizes)
    assert not covers(rows, a * b * c)


def test_a_hole_that_an_overlap_makes_up_for_in_number_is_found() -> None:
    assert not covers([(0, (1,), (4,)), (2, (1,), (4,))], 8)


def test_huge_tensors_are_proven_without_visiting_them() -> None:
    experts, rows, columns = 256, 4096, 7168
    halves = [
        (e * rows * columns + half * columns // 2, (columns, 1), (rows, columns // 2))
        for e in range(experts)
        for half in range(2)
    ]
    assert covers(halves, experts * rows * columns)
    assert not covers(halves[:-1], experts * rows * columns)


def planned(position: int = 8) -> Store:
    tensor = StoredTensor("w", DTYPES["F32"], (4,), (Chunk((0,), (4,), "f", position),))
    return Store(Path(), "safetensors", {"w": tensor}, {"f": 24})


def test_every_byte_of_a_chunk_must_be_written() -> None:
    store = planned()
    whole = extent("f", 8, 0, [4], (1,), (1,))
    prove_chunks(store, [(whole, 4)])
    for wrong in (extent("f", 8, 0, [3], (1,), (1,)), extent("f", 4, 0, [4], (1,), (1,))):
        with pytest.raises(LayoutError, match="exactly once"):
            prove_chunks(store, [(wrong, 4)])
    with pytest.raises(LayoutError, match="exactly once"):
        prove_chunks(store, [(whole, 4), (extent("f", 12, 1, [1], (1,), (1,)), 4)])


def test_headers_and_chunks_may_not_overlap_or_leave_the_file() -> None:
    prove_files(planned(), [Framing("f", 0, b"x" * 8)])
    with pytest.raises(LayoutError, match="overlaps"):
        prove_files(planned(), [Framing("f", 0, b"x" * 9)])
    with pytest.raises(LayoutError, match="leaves"):
        prove_files(planned(position=12), [])
