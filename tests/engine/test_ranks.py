"""One plan in several processes: the same files as one makes, and whatever happens to one of them, all hear of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools import CopyReport, consolidate, convert, join_ranks, verify
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import InputChangedError, LockedError, RankError, StorageError, UsageError
from ckpt_tools.engine import cloning, copy, execute, files, ranks, sharing
from ckpt_tools.engine.ends import Plain
from ckpt_tools.engine.execute import Copied, Outcome, Task
from ckpt_tools.engine.journal import JOURNAL
from ckpt_tools.engine.plan import LeafCopy
from ckpt_tools.engine.ranks import FirstRank, OtherRank
from ckpt_tools.engine.rendezvous import Place
from ckpt_tools.engine.shares import RemoteJournal, share_of
from ckpt_tools.engine.staging import Staging
from tests.checkpoints import make_repository, tensor_bytes, write_repository
from tests.engine.file_systems import BLOCK, StandIn, stand_in

ROOT = Path(__file__).parents[2]
Work = Callable[["FirstRank | OtherRank | None"], CopyReport]


def environment(rank: int, world: int, run: str = "test") -> dict[str, str]:
    """What torchrun sets."""
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 29500}
    return {**{name: str(n) for name, n in numbers.items()}, "MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": run}


def together(
    world: int, destination: Path, *works: Work, seconds: float = 20, local: bool = True
) -> list[CopyReport | BaseException]:
    """How the work ends on each of `world` ranks; the last of `works` is that of all further ranks."""
    ended: list[CopyReport | BaseException] = [RuntimeError("did not end")] * world

    def run(rank: int) -> None:
        try:
            given = environment(rank, world)
            given |= {} if local else {"LOCAL_WORLD_SIZE": "1"}
            with join_ranks(destination, given, seconds=seconds) as joined:
                ended[rank] = works[min(rank, len(works) - 1)](joined)
        except BaseException as error:
            ended[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ended


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("ranks") / "source", vocab_size=512)


@given(sizes=st.lists(st.integers(0, 1000), max_size=60), world=st.integers(1, 12))
def test_shares_are_even_and_each_task_is_in_one(sizes: list[int], world: int) -> None:
    copy = LeafCopy("x", 0, Plain((), DTYPES["U8"], 1))
    tasks = [Task(number, copy, 0, size) for number, size in enumerate(sizes)]
    shares = [share_of(tasks, rank, world) for rank in range(world)]
    assert [task for share in shares for task in share] == tasks
    fair = (sum(sizes) + len(sizes)) / world
    for share in shares:
        assert abs(sum(max(1, task.nbytes) for task in share) - fair) <= max(sizes, default=0) + 2


@pytest.mark.parametrize("world", [2, 3, 5])
def test_several_ranks_make_the_files_that_one_makes(tmp_path: Path, source: Path, world: int) -> None:
    convert(source, tmp_path / "one", mesh="dp_shard=2,ep=2")
    consolidate(tmp_path / "one", tmp_path / "one-hf", max_shard_size=30_000)
    reports = together(
        world,
        tmp_path / "many",
        lambda ranks: convert(source, tmp_path / "many", mesh="dp_shard=2,ep=2", ranks=ranks),
    )
    assert [r.ranks for r in reports if isinstance(r, CopyReport)] == [world] * world, reports
    ended = together(
        world,
        tmp_path / "many-hf",
        lambda ranks: consolidate(tmp_path / "one", tmp_path / "many-hf", max_shard_size=30_000, ranks=ranks),
    )
    assert all(isinstance(report, CopyReport) for report in ended), ended
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert contents(tmp_path / "many-hf") == contents(tmp_path / "one-hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many", "many-hf", "one", "one-hf"]


def test_every_rank_does_its_share_and_progress_shows_the_whole(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: dict[str, int] = {}
    run = execute.run_task

    def counting(task: Task, *others: object) -> Outcome:
        name = threading.current_thread().name
        moved[name] = moved.get(name, 0) + task.nbytes
        return run(task, *others)  # type: ignore[arg-type]

    class Meter:
        total = done = 0

        def start(self, title: str, total: int) -> None:  # noqa: ARG002
            self.total = total

        def advance(self, count: int) -> None:
            self.done += count

    monkeypatch.setattr(execute, "run_task", counting)
    monkeypatch.setattr(execute, "run_threads", lambda tasks, act, _: [act(task) for task in tasks])
    meter, out = Meter(), tmp_path / "out"
    together(3, out, lambda r: convert(source, out, ranks=r, progress=meter), lambda r: convert(source, out, ranks=r))
    assert len(moved) == 3
    assert max(moved.values()) - min(moved.values()) <= 2 * 512 * 32 * 2
    assert meter.done == meter.total == sum(moved.values())


def test_more_ranks_than_segments(tmp_path: Path) -> None:
    source = write_repository(tmp_path / "source", {"x": (DTYPES["F32"], (3,)), "none": (DTYPES["F32"], (0,))}, {})
    ended = together(4, tmp_path / "out", lambda ranks: consolidate(source, tmp_path / "out", ranks=ranks))
    assert all(isinstance(report, CopyReport) for report in ended), ended
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)


def test_an_error_in_one_rank_is_said_on_all_and_a_run_with_another_number_resumes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    read, lock, reads = files.FileReader.read, threading.Lock(), [0]

    def failing(self: files.FileReader, file: str, position: int, into: memoryview) -> None:
        with lock:
            reads[0] += 1
            if reads[0] == 30:
                raise StorageError(f"cannot read {file}: Input/output error", hint="check the disk")
        read(self, file, position, into)

    monkeypatch.setattr(files.FileReader, "read", failing)
    ended = together(3, out, lambda ranks: convert(source, out, threads=1, ranks=ranks))
    monkeypatch.undo()
    kinds = sorted(type(error).__name__ for error in ended)
    assert kinds == ["RankError", "RankError", "StorageError"], ended
    failed = next(rank for rank, error in enumerate(ended) if isinstance(error, StorageError))
    for error in ended:
        if isinstance(error, RankError):
            assert error.message.startswith(f"rank {failed} ({socket.gethostname()}")
            assert error.message.endswith("Input/output error")
            assert error.hint == "check the disk"
    assert not out.exists()

    redone, run = [0], execute.run_task

    def counting(*arguments: object) -> Outcome:
        with lock:
            redone[0] += 1
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(execute, "run_task", counting)
    again = together(2, out, lambda ranks: convert(source, out, threads=1, ranks=ranks))
    assert isinstance(again[0], CopyReport), again
    assert 0 < redone[0] <= again[0].tensors - 25
    verify(out, against=source)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_ranks_that_do_not_plan_the_same_are_refused(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    ended = together(
        2, out, lambda r: convert(source, out, ranks=r), lambda r: convert(source, out, mesh="ep=2", ranks=r)
    )
    for error in ended:
        assert isinstance(error, RankError)
        assert "rank 1" in error.message
        assert "has other options than rank 0" in error.message
    assert not out.exists()


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(sharing, "WORTH", BLOCK)
    return stand_in(monkeypatch)


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_the_first_rank_shares_blocks_and_nobody_writes_to_them(
    tmp_path: Path, double: StandIn, monkeypatch: pytest.MonkeyPatch, digests: bool, refused: bool
) -> None:
    source, written = make_repository(tmp_path / "source", vocab_size=2048, hidden_size=128), [0]
    if refused:
        largest = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        double.refusing.add(largest.stat().st_ino)
    clone, write, callers = cloning.clone_range, files.FileWriter.write, set()

    def cloning_range(*arguments: int) -> bool:
        callers.add(threading.current_thread().name)
        return clone(*arguments)

    def counting(self: files.FileWriter, file: str, position: int, data: memoryview) -> None:
        written[0] += len(data)
        write(self, file, position, data)

    monkeypatch.setattr(cloning, "clone_range", cloning_range)
    monkeypatch.setattr(files.FileWriter, "write", counting)
    one = convert(source, tmp_path / "one", digests=digests)
    alone, out = written[0], tmp_path / "out"
    callers.clear()
    ended = together(3, out, lambda ranks: convert(source, out, digests=digests, ranks=ranks))
    for report in ended:
        assert isinstance(report, CopyReport), ended
        assert (report.shared, report.undigested) == (one.shared, one.undigested)
    assert one.shared > one.nbytes / 4
    assert (one.undigested == 0) is digests
    assert len(callers) == 1
    assert written[0] == 2 * alone <= 2 * (one.nbytes - one.shared)
    assert contents(out) == contents(tmp_path / "one")
    verify(out, against=source)


def test_ranks_that_could_share_no_blocks_themselves_plan_as_the_first_one_does(
    tmp_path: Path, source: Path, double: StandIn
) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    double.refusing.update(path.stat().st_ino for path in copy.glob("*.safetensors"))
    ended = together(
        2, out, lambda ranks: convert(source, out, ranks=ranks), lambda ranks: convert(copy, out, ranks=ranks)
    )
    assert [isinstance(report, CopyReport) and report.shared > 0 for report in ended] == [True, True], ended
    verify(out, against=source)


def test_a_copy_of_the_source_at_another_path_and_time_is_the_same_source(tmp_path: Path, source: Path) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    ended = together(
        2, out, lambda ranks: convert(source, out, ranks=ranks), lambda ranks: convert(copy, out, ranks=ranks)
    )
    assert all(isinstance(report, CopyReport) for report in ended), ended
    verify(out, against=source)


def test_what_the_first_rank_meets_the_others_hear(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with Staging(out):
        ended = together(3, out, lambda ranks: convert(source, out, ranks=ranks))
    assert isinstance(ended[0], LockedError)
    for error in ended[1:]:
        assert isinstance(error, RankError)
        assert "rank 0" in error.message
        assert "another run is writing" in error.message


def test_an_input_that_changes_under_one_rank_fails_all(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, out, run = tmp_path / "copy", tmp_path / "out", execute.run_task
    shutil.copytree(source, copy)

    def meddling(task: Task, *others: object) -> Outcome:
        os.utime(copy / task.copy.source.first()[0], ns=(1, time.time_ns()))
        return run(task, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(execute, "run_task", meddling)
    ended = together(2, out, lambda ranks: convert(copy, out, ranks=ranks))
    assert any(isinstance(error, InputChangedError) for error in ended)
    assert all(isinstance(error, InputChangedError | RankError) for error in ended)
    assert not out.exists()


def test_a_rank_that_does_not_come_is_named(tmp_path: Path, source: Path) -> None:
    out, place = tmp_path / "out", Place.of_environment(environment(0, 3))
    assert place is not None
    with (
        pytest.raises(RankError, match="rank 1, 2 of 3 did not come"),
        FirstRank(place, out, join_seconds=0.2) as first,
    ):
        convert(source, out, ranks=first)
    place = Place.of_environment(environment(1, 3))
    assert place is not None
    with pytest.raises(RankError, match="found nobody"), OtherRank(place, out, join_seconds=0.2):
        pass
    assert not list(tmp_path.glob(".out.ckpt-ranks*"))


def test_a_file_that_a_killed_run_left_leads_nobody_astray(tmp_path: Path, source: Path) -> None:
    out, place = tmp_path / "out", Place.of_environment(environment(0, 2))
    assert place is not None
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
    place.meeting_point(out).write_text(json.dumps({"addresses": ["127.0.0.1"], "port": port, "secret": "old"}))
    ended = together(2, out, lambda ranks: convert(source, out, ranks=ranks))
    assert all(isinstance(report, CopyReport) for report in ended), ended


def test_only_who_can_read_the_file_is_let_in(tmp_path: Path) -> None:
    place = Place.of_environment(environment(0, 2))
    assert place is not None
    with FirstRank(place, tmp_path / "out", join_seconds=1):
        meeting_point = place.meeting_point(tmp_path / "out")
        assert meeting_point.stat().st_mode & 0o777 == 0o600
        door = json.loads(meeting_point.read_text())
        assert door["addresses"] == ["127.0.0.1"]
        for hello in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1, "world": 2, "secret": "guess"}\n', b"\xff" * 9000):
            with (
                contextlib.suppress(OSError),  # the door may be shut before everything is said
                socket.create_connection(("127.0.0.1", door["port"])) as guest,
            ):
                guest.sendall(hello)
                guest.shutdown(socket.SHUT_WR)
                assert guest.recv(100) == b""


def test_on_another_machine_a_segment_counts_only_once_it_is_synced() -> None:
    events: list[object] = []

    class Writer:
        def sync(self) -> None:
            events.append("sync")

    journal = RemoteJournal(events.append, Writer(), sync_seconds=0.2)  # type: ignore[arg-type]
    journal.record(0, Outcome(b"a" * 16, True))
    assert events == []
    time.sleep(0.25)
    journal.record(1, Outcome(b"b" * 16, False))
    journal.record(2, Outcome(b"c" * 16, True))
    assert events == ["sync", {"done": [(0, True, (b"a" * 16).hex()), (1, False, (b"b" * 16).hex())]}]
    journal.close()
    assert events[2:] == ["sync", {"done": [(2, True, (b"c" * 16).hex())]}]


def test_machines_that_share_a_file_system_make_the_same_files(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "boot_mark", lambda: "another machine")
    out, synced, sync = tmp_path / "out", [0], files.FileWriter.sync

    def counting(self: files.FileWriter) -> None:
        synced[0] += 1
        sync(self)

    monkeypatch.setattr(files.FileWriter, "sync", counting)
    monkeypatch.setattr(ranks, "SYNC_SECONDS", 1e-9)
    convert(source, tmp_path / "one")
    alone = synced[0]
    ended = together(2, out, lambda ranks: convert(source, out, ranks=ranks), local=False)
    assert all(isinstance(report, CopyReport) for report in ended), ended
    assert synced[0] > alone + 2
    assert contents(out) == contents(tmp_path / "one")


def test_where_nothing_is_left_to_do_the_others_end_too(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"

    def conclude(joined: FirstRank | OtherRank | None) -> CopyReport:
        assert isinstance(joined, FirstRank)
        joined.conclude(Copied(frozenset({"x"})))
        return convert(source, out)

    ended = together(3, out, conclude, lambda ranks: convert(source, out, ranks=ranks, overwrite=True))
    assert [report.rounded for report in ended if isinstance(report, CopyReport)] == [0, 1, 1], ended


@pytest.mark.parametrize("refused", [False, True])
def test_what_a_killed_run_had_put_in_place_is_not_made_again(
    tmp_path: Path, double: StandIn, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    source, out = make_repository(tmp_path / "source", vocab_size=2048, hidden_size=128), tmp_path / "out"
    if refused:
        smallest = min(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        double.refusing.add(smallest.stat().st_ino)
    one = convert(source, tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "_clean_up", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out)
    made = contents(out)
    monkeypatch.setattr(execute, "run_task", _interrupted)
    ended = together(3, out, lambda ranks: convert(source, out, overwrite=True, ranks=ranks))
    for report in ended:
        assert isinstance(report, CopyReport), ended
        assert (report.shared, report.undigested) == (one.shared, one.undigested)
    assert one.shared
    assert contents(out).items() < made.items()
    verify(out, against=source)


@pytest.mark.parametrize("asked", [{"sha256": True}, {"digests": True}])
@pytest.mark.usefixtures("double")
def test_what_a_killed_run_had_put_in_place_without_what_is_asked_for_is_made_again(
    tmp_path: Path, asked: dict[str, bool]
) -> None:
    source, out = make_repository(tmp_path / "source", vocab_size=2048, hidden_size=128), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "_clean_up", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out)
    report = convert(source, out, overwrite=True, **asked)
    assert report.shared
    assert (out / "SHA256SUMS").exists() is ("sha256" in asked)
    assert (report.undigested == 0) is ("digests" in asked)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_source_is_verified_once_and_before_anything_is_put_into_place(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, events = tmp_path / "out", []
    for owner, name in ((copy, "verify_changed"), (cloning, "share"), (execute, "run_task")):
        real = getattr(owner, name)

        def noted(*arguments: object, _real: Callable[..., object] = real, _name: str = name, **more: object) -> object:
            events.append(_name)
            return _real(*arguments, **more)

        monkeypatch.setattr(owner, name, noted)
    ended = together(3, out, lambda ranks: convert(source, out, dtype="float32", ranks=ranks))
    assert all(isinstance(report, CopyReport) for report in ended), ended
    assert events[:2] == ["verify_changed", "share"]
    assert set(events[2:]) == {"run_task"}


def test_after_a_sync_that_failed_on_any_rank_a_run_starts_anew(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, sync = tmp_path / "out", RemoteJournal.close

    def failing(self: RemoteJournal) -> None:
        sync(self)
        raise StorageError("cannot sync a file")

    with monkeypatch.context() as patch:
        patch.setattr(RemoteJournal, "close", failing)
        ended = together(2, out, lambda ranks: convert(source, out, ranks=ranks))
    assert isinstance(ended[0], RankError)
    assert isinstance(ended[1], StorageError)
    assert not (Staging(out).path / JOURNAL).exists()
    convert(source, out)
    verify(out, against=source)


def test_a_directory_that_is_not_shared_is_noticed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, check = tmp_path / "out", Staging.check_shared

    def elsewhere(self: Staging, key: bytes) -> None:
        self.path = tmp_path / "another machine's"
        check(self, key)

    monkeypatch.setattr(Staging, "check_shared", elsewhere)
    ended = together(2, out, lambda ranks: convert(source, out, ranks=ranks))
    assert isinstance(ended[0], RankError)
    assert isinstance(ended[1], StorageError)
    assert "is not the directory that rank 0 works in" in ended[1].message


@pytest.mark.parametrize(
    ("given_environment", "place"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
    ],
)
def test_places(given_environment: dict[str, str], place: tuple[int, int] | None) -> None:
    found = Place.of_environment(given_environment)
    assert (found and (found.rank, found.world)) == place


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("0", "-1")])
def test_a_place_that_cannot_be_is_refused(rank: str, world: str) -> None:
    with pytest.raises(UsageError, match="do not name one process"):
        Place.of_environment({"RANK": rank, "WORLD_SIZE": world})


PROGRAM = """
import os, sys, time
from ckpt_tools.cli.app import app
from ckpt_tools.engine import execute, rendezvous
run = execute.run_task
def slow(*arguments):
    time.sleep(0.05)
    return run(*arguments)
execute.run_task = slow
sys.modules["__main__"].__spec__ = type("Spec", (), {"name": "ckpt_tools.__main__"})
app(prog_name="ckpt")
"""
"""The command as torchrun starts it, a twentieth of a second a segment."""


def start(rank: int, world: int, *arguments: object, program: str = PROGRAM) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    env = {**os.environ, **environment(rank, world), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_journal(folder: Path) -> Path:
    """The journal of the output `out`, once some segments are in it."""
    journal, deadline = folder / ".out.ckpt-staging" / ".ckpt-journal", time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size > 300) and time.monotonic() < deadline:
        time.sleep(0.01)
    return journal


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_by_all_others_at_once_and_a_rerun_completes(
    tmp_path: Path, source: Path, victim: int
) -> None:
    out = tmp_path / "out"
    processes = [start(rank, 3, "convert", source, out, "--threads", 1) for rank in range(3)]
    wait_for_journal(tmp_path)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    for rank, process in enumerate(processes):
        stdout, stderr = process.communicate(timeout=60)
        if rank != victim:
            assert process.returncode == RankError.exit_code, stderr
            assert f"rank {victim} (" in stderr
            assert "went away" in stderr
            assert "run the same command again: it resumes" in stderr
            assert stdout == ""
    assert time.monotonic() - began < 5
    assert not out.exists()
    report = convert(source, out)
    assert report.tensors == len(tensor_bytes(source))
    verify(out, against=source)
    assert not list(tmp_path.glob(".out*"))


def test_only_the_first_process_prints_and_only_the_module_looks_at_the_environment(
    tmp_path: Path, source: Path
) -> None:
    out = tmp_path / "out"
    both = [start(rank, 2, "convert", source, out, "--json", "--quiet") for rank in range(2)]
    plans = [start(rank, 2, "plan", source, "--json") for rank in range(2)]
    dry = start(1, 2, "convert", source, out, "--dry-run", "--json")
    alone = "from ckpt_tools.cli import main; main()"
    command = start(1, 2, "convert", source, tmp_path / "alone", "--json", "--quiet", program=alone)
    printed = [process.communicate(timeout=60) for process in (*both, *plans, dry, command)]
    assert [process.returncode for process in (*both, *plans, dry, command)] == [0] * 6, printed
    assert [(bool(stdout), stderr) for stdout, stderr in printed[:5]] == [
        (True, ""),
        (False, ""),
        (True, ""),
        (False, ""),
        (False, ""),
    ]
    assert json.loads(printed[0][0])["ranks"] == 2
    assert json.loads(printed[5][0])["ranks"] == 1


def test_an_error_is_one_json_object_of_the_first_process(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    both = [start(rank, 2, "convert", source, tmp_path / "out", "--json") for rank in range(2)]
    (stdout, stderr), (other_stdout, other_stderr) = [process.communicate(timeout=60) for process in both]
    assert json.loads(stdout)["exit_code"] == both[0].returncode == 9, stderr
    assert other_stdout == ""
    assert other_stderr.startswith("rank 1: error: ")


def test_torchrun_ends_it_when_a_rank_is_killed_and_runs_it_to_the_end_again(tmp_path: Path, source: Path) -> None:
    pytest.importorskip("torch")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out, slow = tmp_path / "out", tmp_path / "slow.py"
    slow.write_text(PROGRAM)
    convert(source, tmp_path / "one")

    command = [*torchrun, str(slow), "convert", str(source), str(out), "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    journal = wait_for_journal(tmp_path)
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if child.environ().get("RANK") == "1").kill()
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "Signal 9" in stderr
    assert not out.exists()
    assert journal.exists()

    command = [*torchrun, "-m", "ckpt_tools", "convert", str(source), str(out), "--json", "--quiet"]
    ran = subprocess.run(command, capture_output=True, text=True, env=env, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["ranks"] == 2
    assert contents(out) == contents(tmp_path / "one")
    assert not list(tmp_path.glob(".out*"))
