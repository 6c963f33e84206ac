"""Whatever call of the operating system fails, in whatever thread: an error that names it, no half output, a rerun."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tools.core.errors import CkptError, ResourceError, StorageError
from ckpt_tools.engine import execute
from tests.robustness.scenarios import SCENARIOS, Scenario, Stage, counted_tasks
from tests.robustness.shim import TRANSFERS, Call, Faults, Recorder, failing, nothing_written, short, under

QUICK = 3
"""In the quick suite every so many-th call fails, another first one for each scenario and fault."""

pytestmark = pytest.mark.usefixtures("small_segments", "sharing_disk", "fast_syncs")

Chosen = Callable[[Call], bool]


def _writes(stage: Stage) -> Chosen:
    return _among(stage.out.parent, lambda call: call.changes and call.name != "flock")


def _looks(stage: Stage) -> Chosen:
    # What closing a file can say has a test of its own.
    return _among(stage.root, lambda call: not call.changes and call.name != "close")


def _closes(stage: Stage) -> Chosen:
    return _among(stage.root, lambda call: call.name == "close")


def _transfers(stage: Stage) -> Chosen:
    return _among(stage.root, lambda call: call.name in TRANSFERS)


def _locks(stage: Stage) -> Chosen:
    return _among(stage.root, lambda call: call.name == "flock")


def _among(folder: Path, wanted: Chosen) -> Chosen:
    below = under(folder)
    return lambda call: wanted(call) and below(call)


FAULTS: dict[str, tuple[Callable[[Stage], Chosen], int]] = {
    "no space for a change": (_writes, errno.ENOSPC),
    "no quota for a change": (_writes, errno.EDQUOT),
    "a change that the disk fails": (_writes, errno.EIO),
    "a look or read that the disk fails": (_looks, errno.EIO),
    "a close that the disk fails": (_closes, errno.EIO),
    "a transfer that a signal ends": (_transfers, errno.EINTR),
    "a transfer that would block": (_transfers, errno.EAGAIN),
    "no locks": (_locks, errno.ENOLCK),
}


@pytest.mark.parametrize("scenario", SCENARIOS[::2], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_is_named_and_leaves_old_or_nothing_and_a_rerun_completes(
    tmp_path: Path, scenario: Scenario, fault: str, full: bool
) -> None:
    stage = Stage(tmp_path, scenario)
    choose, code = FAULTS[fault]
    faults = Faults(failing(code), choose(stage), ())
    stage.reset()
    with stage.shim(faults):
        stage.run()
    assert faults.seen
    first = (SCENARIOS.index(scenario) + list(FAULTS).index(fault)) % QUICK
    for number in range(1 + (0 if full else first), faults.seen + 1, 1 if full else QUICK):
        _fail_and_rerun(stage, choose(stage), code, number)


def _fail_and_rerun(stage: Stage, chosen: Chosen, code: int, number: int) -> None:
    stage.reset()
    faults = Faults(failing(code), chosen, [number])
    error: CkptError | None = None
    with stage.shim(faults):
        try:
            stage.run(threads=2)
        except CkptError as raised:
            error = raised
    where = f"call {number}, {[f'{call.name} {call.paths}' for call in faults.hit]}: {error}"
    state = stage.state()
    assert threading.active_count() == 1 or not _own_threads(), where
    if error is None:
        # What cannot be seen is taken for absent, and is there when it matters.
        assert state == "new", where
    else:
        assert isinstance(error, StorageError), where
        # Removing a tree goes on after a directory that it could not close, and stumbles later.
        assert os.strerror(code) in error.message or "No such file" in error.message, where
        assert str(stage.root) in error.message, where
        assert error.message.startswith("cannot ") or "cannot be read" in error.message, where
    if error is not None and state == "new" and not stage.scenario.overwrite:
        stage.reset()  # the output was in place already: nothing is left to do
    with stage.shim(Recorder()):
        if state != "new" or stage.scenario.overwrite or error is not None:
            stage.run()
    assert stage.state() == "new", where
    assert stage.beside() == [], where


def _own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ckpt-")]


@pytest.mark.parametrize("scenario", SCENARIOS[:4], ids=str)
def test_short_reads_and_writes_are_completed(tmp_path: Path, scenario: Scenario) -> None:
    stage = Stage(tmp_path, scenario)
    stage.reset()
    faults = Faults(short, _transfers(stage))
    with stage.shim(faults):
        stage.run(threads=2)
    assert {call.name for call in faults.hit} >= {"pwrite", "pread", "preadv"}
    assert stage.state() == "new"


@pytest.mark.parametrize("number", [1, 2, 15, 25, 28])
def test_a_write_that_takes_nothing_does_not_go_on_for_ever(tmp_path: Path, number: int) -> None:
    stage = Stage(tmp_path, SCENARIOS[0])
    stage.reset()
    writes = _among(stage.out.parent, lambda call: call.name == "pwrite")
    with stage.shim(Faults(nothing_written, writes, range(number, 1000))), pytest.raises(StorageError, match="write"):
        stage.run()
    assert stage.state() == "absent"


@pytest.mark.parametrize("scenario", SCENARIOS[:4], ids=str)
def test_after_a_sync_that_failed_nothing_is_believed_to_be_on_the_disk(tmp_path: Path, scenario: Scenario) -> None:
    """The system reports a lost write once; a second sync of the same file succeeds without it."""
    stage = Stage(tmp_path, scenario)
    below = under(stage.out.parent)
    held = _among(stage.out.parent, lambda call: call.name == "fsync" and _holds_output(call))
    numbered = Faults(failing(errno.EIO), held, ())
    stage.reset()
    with stage.shim(numbered):
        stage.run()
    for number in range(1, numbered.seen + 1):
        stage.reset()
        faults = Faults(failing(errno.EIO), held, [number])
        with stage.shim(faults), pytest.raises(StorageError, match=r"cannot sync .*Input/output error") as raised:
            stage.run()
        assert "starts anew" in (raised.value.hint or "")
        assert below(faults.hit[0])
        with counted_tasks() as count, stage.shim(Recorder()):
            stage.run()
        assert count() == stage.tasks, faults.hit[0].paths
        assert stage.state() == "new"


def _holds_output(call: Call) -> bool:
    """Whether segments are in it that a journal speaks of, or the names of such files."""
    name = Path(call.paths[0]).name
    return name.endswith((".distcp", "model.safetensors", "00001-of-00002.safetensors", "-staging", "-journal"))


def test_writes_are_interrupted_by_real_signals_and_go_on(tmp_path: Path) -> None:
    stage = Stage(tmp_path, SCENARIOS[0])
    stage.reset()
    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        stage.run(threads=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came
    assert stage.state() == "new"


@pytest.mark.parametrize("refused", [1, 3])
def test_a_system_that_gives_fewer_threads_is_served_by_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    stage = Stage(tmp_path, SCENARIOS[0])
    stage.reset()
    start, calls = threading.Thread.start, [0]

    def limited(thread: threading.Thread) -> None:
        calls[0] += 1
        if calls[0] >= refused:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    if refused == 1:
        with pytest.raises(ResourceError, match="thread"):
            stage.run(threads=4)
        assert stage.state() == "absent"
    else:
        stage.run(threads=4)
        assert stage.state() == "new"


def test_a_second_interruption_does_not_leave_a_thread_that_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    release, alive = threading.Event(), [0]

    def work(_task: int) -> None:
        alive[0] += 1
        release.wait(10)
        alive[0] -= 1

    join, calls = threading.Thread.join, [0]

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        calls[0] += 1
        if calls[0] <= 3:
            raise KeyboardInterrupt
        release.set()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute.run_threads(iter(range(100)), work, 2)
    assert alive == [0]
    assert not _own_threads()
