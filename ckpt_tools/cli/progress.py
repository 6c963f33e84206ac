"""Progress on stderr: bars on a terminal, a plain line every few seconds elsewhere.

Worker threads only add to a counter; a thread of its own draws, so that drawing never slows copying down. Nothing is
drawn, and rich is not imported, before half a second has passed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TextIO

from ckpt_tools.cli.text import duration
from ckpt_tools.core.sizes import format_size

if TYPE_CHECKING:
    import rich.progress

PERIOD = 0.5
"""Seconds between two looks at the counters."""


@dataclass
class Stage:
    """One pass over bytes; `done` of `total` have moved."""

    title: str
    total: int
    done: int = 0


class Display(Protocol):
    """Draws the stages. All calls come from one thread at a time."""

    def draw(self, stages: Sequence[Stage]) -> None:
        """The stages so far; the last one is going on."""

    def close(self, stages: Sequence[Stage]) -> None:
        """The run has ended, well or not."""


class Meter:
    """Counts the bytes that worker threads report, and has them drawn until it is closed."""

    def __init__(self, display: Display, *, period: float = PERIOD) -> None:
        self._display = display
        self._period = period
        self._stages: list[Stage] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._drawer = threading.Thread(target=self._draw, name="ckpt-progress", daemon=True)

    def start(self, title: str, total: int) -> None:
        with self._lock:
            self._stages.append(Stage(title, total))

    def advance(self, count: int) -> None:
        with self._lock:
            self._stages[-1].done += count

    def __enter__(self) -> Meter:
        self._drawer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._drawer.join()
        self._call(self._display.close)

    def _draw(self) -> None:
        while not self._closed.wait(self._period):
            if not self._call(self._display.draw):
                return

    def _call(self, method: Callable[[Sequence[Stage]], None]) -> bool:
        """Whether the display could be drawn: progress that nobody reads any more must not end the work."""
        with self._lock:
            stages = [replace(stage) for stage in self._stages]
        try:
            if stages:
                method(stages)
        except OSError:
            return False
        return True


class Lines:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, stream: TextIO, *, interval: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._written_at = clock()
        self._written = Stage("", 0, -1)
        self._number = -1
        self._samples: deque[tuple[float, int]] = deque(maxlen=60)

    def draw(self, stages: Sequence[Stage]) -> None:
        now, current, number = self._clock(), stages[-1], len(stages) - 1
        if number != self._number:
            self._finish(stages)
            self._number, self._written = number, Stage("", 0, -1)
            self._samples.clear()
        self._samples.append((now, current.done))
        if now - self._written_at >= self._interval:
            self._write(current, self._pace(current))
            self._written_at = now

    def close(self, stages: Sequence[Stage]) -> None:
        self._finish(stages)

    def _finish(self, stages: Sequence[Stage]) -> None:
        """A stage that was shown, and that reached its end since then, is shown at its end."""
        if 0 <= self._written.done < stages[self._number].done == stages[self._number].total:
            self._write(stages[self._number])

    def _pace(self, stage: Stage) -> str:
        # The first sample holds what a resumed run had done before; only what came after it says how fast we are.
        (began, before), (now, done) = self._samples[0], self._samples[-1]
        if done <= before or now <= began or done >= stage.total:
            return ""
        rate = (done - before) / (now - began)
        return f", {format_size(rate)}/s, {duration((stage.total - stage.done) / rate)} left"

    def _write(self, stage: Stage, pace: str = "") -> None:
        self._written = replace(stage)
        part = f" ({stage.done * 100 // stage.total} %)" if stage.total else ""
        amount = f"{stage.title} {format_size(stage.done)} of {format_size(stage.total)}{part}"
        self._stream.write(f"{amount}{pace}\n")
        self._stream.flush()


class Bars:
    """A bar a stage, with bytes, rate and time left, drawn by rich."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: rich.progress.Progress | None = None
        self._tasks: list[rich.progress.TaskID] = []

    def draw(self, stages: Sequence[Stage]) -> None:
        progress = self._progress or self._begin()
        for number, stage in enumerate(stages):
            if number == len(self._tasks):
                self._tasks.append(progress.add_task(stage.title, total=stage.total))
            progress.update(self._tasks[number], completed=stage.done)
        progress.refresh()

    def close(self, stages: Sequence[Stage]) -> None:
        if self._progress is not None:
            self.draw(stages)
            self._progress.stop()

    def _begin(self) -> rich.progress.Progress:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=Console(file=self._stream, markup=False, highlight=False),
            auto_refresh=False,
        )
        self._progress.start()
        return self._progress
