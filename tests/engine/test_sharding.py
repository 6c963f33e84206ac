"""Boxes of ranks are those that torch gives to DTensor, also where sizes do not divide (TRAPS: remainder-first)."""

from __future__ import annotations

import pytest

from ckpt_tools.core.errors import UsageError
from ckpt_tools.engine.sharding import ShardingMesh, boxes, parse_mesh, shard_range


@pytest.mark.parametrize("parts", [1, 2, 3, 12, 24, 48, 200])
@pytest.mark.parametrize("size", [1, 5, 128, 129])
def test_shard_ranges_are_those_of_torch_chunk(size: int, parts: int) -> None:
    torch = pytest.importorskip("torch")
    chunks = [c.tolist() for c in torch.arange(size).chunk(parts)]
    chunks += [[]] * (parts - len(chunks))
    assert [list(range(*shard_range(size, parts, i))) for i in range(parts)] == chunks


def test_experts_are_split_by_ep_and_rows_by_dp_shard() -> None:
    found = list(boxes((4, 6, 3), ShardingMesh(dp_shard=2, ep=2), stacked=True))
    assert found == [
        (0, (0, 0, 0), (2, 3, 3)),
        (1, (2, 0, 0), (2, 3, 3)),
        (2, (0, 3, 0), (2, 3, 3)),
        (3, (2, 3, 0), (2, 3, 3)),
    ]


def test_ranks_without_a_part_are_left_out_and_empty_tensors_are_kept_once() -> None:
    assert [rank for rank, _, _ in boxes((3,), ShardingMesh(ep=8), stacked=False)] == [0, 1, 2]
    assert list(boxes((0, 4), ShardingMesh(ep=2), stacked=False)) == [(0, (0, 0), (0, 4))]
    assert list(boxes((), ShardingMesh(ep=2), stacked=False)) == [(0, (), ())]


def test_a_mesh_is_read_from_text() -> None:
    assert parse_mesh("dp_shard=2, ep=4") == ShardingMesh(2, 4)


@pytest.mark.parametrize("text", ["eq=2", "ep=0", "ep=x", "ep"])
def test_a_wrong_mesh_says_what_is_wrong(text: str) -> None:
    with pytest.raises(UsageError, match="--mesh"):
        parse_mesh(text)
