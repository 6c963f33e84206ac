"""Progress: bars on a terminal, lines in a log, silence when it is quick, and never in the way of the work."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ckpt_tools.cli.progress import Bars, Lines, Meter, Stage
from tests.cli.conftest import Run


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_interval_with_rate_and_time_left() -> None:
    clock, log = Clock(), io.StringIO()
    lines, stage = Lines(log, interval=5, clock=clock), Stage("copying", 61_000_000_000)
    for second in range(11):
        clock.now, stage.done = 100.0 + second, second * 1_000_000_000
        lines.draw([stage])
    assert log.getvalue() == (
        "copying 5 GB of 61 GB (8 %), 1 GB/s, 56 s left\ncopying 10 GB of 61 GB (16 %), 1 GB/s, 51 s left\n"
    )


def test_the_rate_of_a_resumed_run_leaves_out_what_was_done_before() -> None:
    clock, log = Clock(), io.StringIO()
    lines, stage = Lines(log, interval=5, clock=clock), Stage("copying", 100_000_000_000, 90_000_000_000)
    lines.draw([stage])
    clock.now, stage.done = 105.0, 91_000_000_000
    lines.draw([stage])
    assert log.getvalue() == "copying 91 GB of 100 GB (91 %), 200 MB/s, 45 s left\n"


def test_a_stage_that_was_shown_is_shown_at_its_end_and_a_quick_one_not_at_all() -> None:
    clock, log = Clock(), io.StringIO()
    lines = Lines(log, interval=5, clock=clock)
    copying, comparing = Stage("copying", 1000, 10), Stage("comparing", 1000, 10)
    clock.now = 106.0
    lines.draw([copying])
    copying.done, clock.now = 1000, 107.0
    lines.draw([copying, comparing])
    comparing.done = 1000
    lines.close([copying, comparing])
    assert [line.partition(" of ")[0] for line in log.getvalue().splitlines()] == ["copying 10 B", "copying 1 kB"]


def test_an_end_that_was_shown_is_not_shown_twice() -> None:
    clock, log = Clock(), io.StringIO()
    lines = Lines(log, interval=5, clock=clock)
    lines.draw([Stage("copying", 1000, 10)])
    clock.now = 106.0
    lines.draw([Stage("copying", 1000, 1000)])
    lines.close([Stage("copying", 1000, 1000)])
    assert log.getvalue() == "copying 1 kB of 1 kB (100 %)\n"


def test_an_unfinished_stage_does_not_claim_its_end() -> None:
    clock, log = Clock(), io.StringIO()
    lines = Lines(log, interval=5, clock=clock)
    clock.now = 106.0
    lines.draw([Stage("copying", 1000, 10)])
    lines.close([Stage("copying", 1000, 500)])
    assert log.getvalue() == "copying 10 B of 1 kB (1 %)\n"


def test_nothing_to_copy_is_not_divided_by() -> None:
    clock, log = Clock(), io.StringIO()
    lines = Lines(log, interval=5, clock=clock)
    clock.now = 106.0
    lines.draw([Stage("copying", 0)])
    assert log.getvalue() == "copying 0 B of 0 B\n"


class Recorder:
    def __init__(self, error: Exception | None = None) -> None:
        self.drawn: list[list[Stage]] = []
        self.closed: list[Stage] = []
        self.threads: set[str] = set()
        self._error = error

    def draw(self, stages: Sequence[Stage]) -> None:
        self.threads.add(threading.current_thread().name)
        self.drawn.append(list(stages))
        if self._error is not None:
            raise self._error

    def close(self, stages: Sequence[Stage]) -> None:
        self.closed = list(stages)


def test_the_counts_of_all_worker_threads_add_up() -> None:
    recorder = Recorder()
    with Meter(recorder, period=0.001) as meter:
        meter.start("copying", 8000)

        def work() -> None:
            for _ in range(1000):
                meter.advance(1)

        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        meter.start("comparing", 5)
    assert recorder.closed == [Stage("copying", 8000, 8000), Stage("comparing", 5)]
    assert recorder.threads <= {"ckpt-progress"}


def test_a_log_that_cannot_be_written_does_not_end_the_work() -> None:
    recorder = Recorder(BrokenPipeError())
    with Meter(recorder, period=0.001) as meter:
        meter.start("copying", 2)
        while not recorder.drawn:
            time.sleep(0.001)
        meter.advance(2)
    assert recorder.closed == [Stage("copying", 2, 2)]


def test_a_terminal_gets_a_bar_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = io.StringIO()
    bars = Bars(stream)
    bars.draw([Stage("copying", 2_000_000, 1_000_000)])
    bars.close([Stage("copying", 2_000_000, 2_000_000), Stage("comparing", 10, 10)])
    last = stream.getvalue()
    assert "copying" in last
    assert "comparing" in last
    assert "100%" in last
    assert "2.0/2.0 MB" in last


def test_a_bar_that_was_never_needed_does_not_import_rich() -> None:
    program = (
        "import sys; from ckpt_tools.cli.progress import *\n"
        "with Meter(Bars(sys.stderr)) as m: m.start('copying', 1); m.advance(1)\n"
        "sys.exit('rich' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False)
    assert ran.returncode == 0


def test_a_quick_run_draws_nothing_into_a_log(shell: Run, repository: Path) -> None:
    ran = shell("convert", repository, "out", "--json")
    assert (ran.code, ran.stderr) == (0, "")
    assert ran.json["tensors"] == 56
