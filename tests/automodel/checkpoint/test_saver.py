"""A save beside training writes the values of its moment, exactly as a save that training waits for."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from automodel.checkpoint import Saver, save_checkpoint, saver, step_directory
from automodel.checkpoint.directory import checkpoints
from automodel.checkpoint.host_memory import HostBuffer, available_memory, bytes_for
from automodel.parallel.local import local_part
from ckpt_tools.core.errors import CkptError, StorageError
from ckpt_tools.engine import files
from tests.automodel.ranks import run_ranks, run_ranks_outcomes

CPU = torch.device("cpu")


def a_state(value: float = 1.0) -> dict[str, torch.Tensor]:
    """Sharded tensors of several dtypes, one of them uneven, and such as every rank has."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()

    def sharded(local: torch.Tensor, rows: int) -> torch.Tensor:
        shape = torch.Size((rows, *local.shape[1:]))
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=strides)

    return {
        "even": sharded(torch.full((3, 700), value + rank), 6),
        "uneven": sharded(torch.full((2 - rank, 5), value + rank, dtype=torch.bfloat16), 3),
        "transposed": sharded(torch.arange(12.0).reshape(4, 3).T.add(value), 6),
        "plain": torch.full((41,), value, dtype=torch.float64),
        "step": torch.tensor(value),
        "empty": torch.empty(0, 4),
        f"rng.{rank}": torch.arange(5000, dtype=torch.int64).to(torch.uint8),
    }


def change(state: dict[str, torch.Tensor]) -> None:
    """What training does to the tensors."""
    for tensor in state.values():
        local_part(tensor).zero_()


def writing(directory: Path, state: dict[str, torch.Tensor], keep_last: int | None = None) -> partial:
    description = {"family": "qwen3_moe", "side_files": {"config.json": b"{}"}, "source": {"from": "test"}}
    return partial(save_checkpoint, directory, state, keep_last=keep_last, **description)


def a_saver(state: dict[str, torch.Tensor]) -> Saver:
    made = Saver("on", CPU, timedelta(seconds=60))
    made.reserve(state)
    return made


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_files_are_those_of_a_save_that_training_waits_for_whatever_training_does_meanwhile(tmp_path, processes):
    def save_both():
        state = a_state()
        save_checkpoint_now = writing(tmp_path / "waited", state)
        save_checkpoint_now()
        goes_on = threading.Event()
        write = writing(tmp_path / "beside", state)

        def after_the_change(**options):
            assert goes_on.wait(30)
            write(**options)

        with a_saver(state) as saves:
            saves.save(tmp_path / "beside", state, after_the_change)
            change(state)
            goes_on.set()
            # Collectives of training and of the save at the same time.
            for _ in range(50):
                dist.all_reduce(torch.ones(3))

    run_ranks(processes, save_both)
    assert contents(tmp_path / "beside") == contents(tmp_path / "waited")


def test_each_save_waits_for_the_one_before_it_and_has_its_own_values(tmp_path):
    def save_thrice():
        state = a_state(0.0)
        with a_saver(state) as saves:
            for step in (1, 2, 3):
                state["plain"].fill_(step)
                state["even"].to_local().fill_(step)
                directory = step_directory(tmp_path, step)
                saves.save(directory, state, writing(directory, state, keep_last=2), wait=step == 3)
                before = [path.name for path in checkpoints(tmp_path)]
                assert f"step-{step - 1:06d}" in before or step == 1

    run_ranks(2, save_thrice)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    for step in (2, 3):
        loaded = {"plain": torch.zeros(41, dtype=torch.float64), "even": torch.zeros(6, 700)}
        dcp.load(loaded, storage_reader=FileSystemReader(step_directory(tmp_path, step)), no_dist=True)
        assert all(tensor.eq(step).all() for tensor in loaded.values())


def fill_the_disk(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_raised_on_every_rank_and_the_older_checkpoint_stays(tmp_path):
    def one_rank_has_no_space():
        state = a_state()
        saves = a_saver(state)
        saves.save(tmp_path / "step-000001", state, writing(tmp_path / "step-000001", state))
        saves.wait()
        assert not saves.has_failed
        if dist.get_rank() == 1:
            files.os.pwrite = fill_the_disk
        saves.save(tmp_path / "step-000002", state, writing(tmp_path / "step-000002", state))
        deadline = time.monotonic() + 30
        while not saves.has_failed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert saves.has_failed
        with pytest.raises(StorageError) as caught:
            saves.save(tmp_path / "step-000003", state, writing(tmp_path / "step-000003", state))
        saves.__exit__(None, None, None)
        return caught.value.message, caught.value.hint

    told = run_ranks(2, one_rank_has_no_space)
    assert told[0] == told[1]
    assert "step-000002 failed on rank 1: cannot write" in told[0][0]
    assert "No space left on device" in told[0][0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_kill_during_the_save_leaves_the_older_checkpoint_and_the_next_save_is_not_disturbed(tmp_path, moment):
    def killed():
        state = a_state()
        saves = a_saver(state)
        saves.save(tmp_path / "step-000001", state, writing(tmp_path / "step-000001", state))
        saves.wait()
        if dist.get_rank() == 0:
            setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        saves.save(tmp_path / "step-000002", state, writing(tmp_path / "step-000002", state))
        saves.wait()

    def again():
        state = a_state(2.0)
        with a_saver(state) as saves:
            saves.save(tmp_path / "step-000002", state, writing(tmp_path / "step-000002", state))

    outcomes = run_ranks_outcomes(2, killed)
    assert "exit code -9" in outcomes[0][1]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]
    run_ranks(2, again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_an_error_of_training_waits_for_the_save_and_is_the_one_that_is_raised(tmp_path):
    def training_fails():
        state = a_state()
        write = writing(tmp_path / "step-000001", state)

        def slow(**options):
            time.sleep(0.2)
            write(**options)

        with a_saver(state) as saves:
            saves.save(tmp_path / "step-000001", state, slow)
            raise ZeroDivisionError

    outcomes = run_ranks_outcomes(2, training_fails)
    assert all("ZeroDivisionError" in error for _, error in outcomes)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_ctrl_c_while_waiting_abandons_the_save_and_leaves_nothing(tmp_path):
    def interrupted():
        state = a_state()
        write = writing(tmp_path / "step-000001", state)
        saves = a_saver(state)
        waits = threading.Event()

        def slow(**options):
            assert waits.wait(30)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            # The thread that trains sets this.
            assert saves._abandoned.wait(30)
            write(**options)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        saves.save(tmp_path / "step-000001", state, slow)
        waits.set()
        with pytest.raises(KeyboardInterrupt):
            saves.__exit__(None, None, None)

    run_ranks(2, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_where_one_process_gets_no_memory_all_wait_for_their_saves_and_one_says_why(tmp_path):
    def short_of_memory():
        said = []
        logger = logging.getLogger("automodel")
        logger.addHandler(handler := logging.Handler())
        logger.setLevel(logging.INFO)
        handler.emit = lambda record: said.append(record.getMessage())
        if dist.get_rank() == 1:
            saver.available_memory = lambda: 1000
        state = a_state()
        with a_saver(state) as saves:
            for step in (1, 2):
                directory = step_directory(tmp_path, step)
                saves.save(directory, state, writing(directory, state))
                assert (directory / ".metadata").is_file()
        return said

    first, second = run_ranks(2, short_of_memory)
    assert second == []
    assert len(first) == 3
    assert first[0].startswith("training waits while checkpoints are written: copies of all that is saved take ")
    assert "of whose memory 1 kB is available" in first[0]


def test_the_cpu_saves_beside_training_only_where_it_is_asked_to(tmp_path):
    seen: list[object] = []

    def note(*, background: object) -> None:
        seen.append(background)

    for mode in ("auto", "off", "on"):
        with Saver(mode, CPU, timedelta(seconds=60)) as saves:
            saves.reserve({"a": torch.ones(3)})
            saves.save(tmp_path, {"a": torch.ones(3)}, note)
    assert seen[:2] == [None, None]
    assert seen[2].copies["a"].equal(torch.ones(3))


def test_copies_are_reused_memory_of_a_known_size():
    tensors = {"a": torch.rand(7, 3), "b": torch.tensor(2.0), "none": torch.empty(0, 4), "c": torch.ones(9) > 0}
    buffer = HostBuffer(bytes_for(tensors.values()), pinned=False)
    assert bytes_for(tensors.values()) == 3 * 512
    first = buffer.copy(tensors)
    assert all(torch.equal(first[name], tensor) for name, tensor in tensors.items())
    tensors["a"].fill_(5)
    second = buffer.copy(tensors)
    assert second["a"].data_ptr() == first["a"].data_ptr() != tensors["a"].data_ptr()
    assert torch.equal(second["a"], tensors["a"])


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    from automodel.checkpoint import host_memory

    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     500 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_memory() == 500 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() == 500 * 1024
    (tmp_path / "memory.max").write_text("300000\n")
    (tmp_path / "memory.current").write_text("250000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 70000\n")
    assert available_memory() == 120_000
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "none")
    assert available_memory() is None


def test_an_abandoned_save_says_so(tmp_path):
    def abandoned():
        state = a_state()
        saves = a_saver(state)
        saves._abandoned.set()
        saves.save(tmp_path / "step-000001", state, writing(tmp_path / "step-000001", state))
        with pytest.raises(CkptError, match="the save was abandoned"):
            saves.wait()

    run_ranks(1, abandoned)
