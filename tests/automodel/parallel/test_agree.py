"""What processes agree on."""

from __future__ import annotations

import torch.distributed as dist

from automodel.parallel.agree import least
from tests.automodel.ranks import run_ranks


def of_ranks() -> int:
    return least((dist.get_rank() + 2) % 3)


def test_the_least_value_is_the_same_on_all_processes() -> None:
    assert run_ranks(3, of_ranks) == [0, 0, 0]
    assert least(7) == 7
