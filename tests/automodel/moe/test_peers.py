"""Numbers agreed between the processes of a host, and who has peers at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from automodel.moe import peers
from automodel.moe.peers import Mailbox, open_peers
from ckpt_tools.core.errors import CkptError
from tests.automodel.ranks import run_ranks


def mailboxes(directory: Path, size: int) -> list[Mailbox]:
    path = directory / "mailbox"
    path.write_bytes(bytes(Mailbox.bytes_for(size)))
    return [Mailbox(path, rank, size) for rank in range(size)]


def test_all_get_the_greatest_number_of_each_round(tmp_path: Path) -> None:
    numbers = torch.randint(0, 2**32, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()

    def rounds(box: Mailbox, own: list[int]) -> list[int]:
        return [box.greatest(number) for number in own]

    with ThreadPoolExecutor(3) as threads:
        agreed = list(threads.map(rounds, mailboxes(tmp_path, 3), numbers))
    assert agreed == [[max(column) for column in zip(*numbers, strict=True)]] * 3


def test_a_process_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TIMEOUT_SECONDS", 0.01)
    with pytest.raises(CkptError, match="process 1 of the expert-parallel group"):
        mailboxes(tmp_path, 2)[0].greatest(5)


def test_processes_without_gpus_are_told_so_and_open_a_mailbox_that_leaves_no_file() -> None:
    def meet() -> tuple[object, list[int]]:
        box = peers._open_mailbox(dist.group.WORLD)
        answers = [box.greatest(10 * dist.get_rank() + turn) for turn in range(3)]
        return open_peers(dist.group.WORLD, torch.device("cpu")), answers

    assert run_ranks(2, meet) == [("symmetric dispatch needs CUDA", [10, 11, 12])] * 2
