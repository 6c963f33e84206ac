"""The repair of `_StridedShard` descriptions, for every even cut; DTensor's own arithmetic is the judge."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.distributed.tensor.placement_types import _StridedShard

from ckpt_tools.formats.dcp.strided import true_boxes


@pytest.mark.parametrize(("ranks", "split", "width", "groups"), [*product((2, 3, 4), (2, 3, 5), (1, 2, 3), (1, 2))])
def test_every_even_strided_shard_is_repaired(ranks: int, split: int, width: int, groups: int) -> None:
    extent = ranks * split * width
    rows = torch.arange(groups * extent)
    shards, _ = _StridedShard(0, split_factor=split)._split_tensor(rows[:extent], ranks, with_padding=False)
    held = [shard + group * extent for group in range(groups) for shard in shards]
    described = [((0, int(shard[0])), (3, len(shard))) for shard in held]
    found = true_boxes((3, groups * extent), described)
    assert found is not None
    dim, boxes = found
    assert dim == 1
    for box, shard in zip(described, held, strict=True):
        columns = [offsets[1] + i for offsets, sizes in boxes[box] for i in range(sizes[1])]
        assert columns == shard.tolist()
        assert all((offsets[0], sizes[0]) == (0, 3) for offsets, sizes in boxes[box])


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((8,), [((0,), (4,)), ((3,), (4,))]),
        ((8,), [((0,), (4,)), ((2,), (3,))]),
        ((9,), [((0,), (4,)), ((2,), (4,))]),
        ((8,), [((0,), (4,)), ((2,), (4,)), ((4,), (4,))]),
        ((8, 2), [((0, 0), (4, 2)), ((2, 0), (4, 1))]),
        ((), []),
        ((4,), [((0,), (2,))]),
    ],
)
def test_other_overlaps_and_holes_are_left_to_be_refused(
    shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    assert true_boxes(shape, boxes) is None
