"""Runs a plan: threads take segments of leaves, gather, hash, cast and scatter them in small reused buffers.

Memory is threads times a window, whatever the size of a tensor. The first error stops every thread and is raised in
the caller; nothing is swallowed in a worker.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Protocol, TypeVar

from ckpt_tools.core.errors import MismatchError, ResourceError
from ckpt_tools.core.scratch import Room, mapped, scratch
from ckpt_tools.engine.digest import SEGMENT, combine
from ckpt_tools.engine.ends import Digest
from ckpt_tools.engine.plan import LeafCopy
from ckpt_tools.engine.transfer import Reader, Window, Writer

T = TypeVar("T")

WINDOW = 1 << 20
"""Bytes that a thread holds at once: few calls for plain copies, long runs for strided ones, little memory."""

WIDE = 8 << 20
"""Bytes of a window of a transposed leaf, which makes its runs long; more, up to a segment, where one index of its
first dimension has more: then it is one run."""


class Progress(Protocol):
    """What a caller shows while bytes move. `advance` is called from worker threads."""

    def start(self, title: str, total: int) -> None:
        """A stage of `total` bytes begins."""

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""


@dataclass(frozen=True, slots=True)
class Task:
    """One segment of a leaf; `number` identifies it in the journal."""

    number: int
    copy: LeafCopy
    low: int
    high: int

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return (self.high - self.low) * self.copy.source.itemsize


PlacedTask = tuple[tuple[str, int], Callable[[], None]]
"""Work that begins to read at a place: (file, position)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A segment that was copied.

    Attributes:
        digest: of what the target stores of it.
        exact: False if quantising changed a value.
    """

    digest: bytes
    exact: bool


@dataclass(frozen=True, slots=True)
class Executed:
    """Leaves that were copied.

    Attributes:
        digests: of each leaf in the target.
        rounded: names of those with values that quantising changed.
    """

    digests: dict[str, str]
    rounded: frozenset[str]


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy came to.

    Attributes:
        rounded: names of the leaves that have values that quantising changed.
        shared: bytes of the output that share their blocks with the source.
        undigested: number of leaves whose digest is not known: they were shared, and the source records none.
    """

    rounded: frozenset[str] = frozenset()
    shared: int = 0
    undigested: int = 0


@dataclass
class Journal:
    """Segments that are done. The base class only remembers them; the staging's one writes a file."""

    done: dict[int, Outcome] = field(default_factory=dict)

    def record(self, number: int, outcome: Outcome) -> None:
        self.done[number] = outcome


Share = Callable[[Iterable[Task]], contextlib.AbstractContextManager[Iterator[Task]]]
"""Takes all tasks and gives this process's; on leaving its context the journal has the others' outcomes as well."""


def tasks_of(copies: Sequence[LeafCopy], placed: Collection[str] = ()) -> Iterator[Task]:
    """Every segment of every leaf that is not in place already, numbered."""
    number = 0
    for copy in copies:
        for low, high in copy.segments():
            # Numbers do not depend on what is placed: a rerun may find more or less of it.
            if copy.name not in placed:
                yield Task(number, copy, low, high)
            number += 1


def default_threads() -> int:
    """Threads that pay on one disk: copying is bound by memory and the kernel, not by Python."""
    return max(2, min(8, os.cpu_count() or 2))


_room = Room(max(SEGMENT, WIDE * default_threads()))


def room_for(copy: LeafCopy) -> contextlib.AbstractContextManager[None]:
    """Waits for the memory of a window of the leaf, if it is one of the few that are large."""
    nbytes = window_items(copy) * copy.source.itemsize
    return _room.take(nbytes) if nbytes > WIDE else contextlib.nullcontext()


def execute(
    copies: Sequence[LeafCopy],
    reader: Reader,
    writer: Writer,
    *,
    journal: Journal | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    expected: Mapping[str, str] | None = None,
    beside: Iterable[PlacedTask] = (),
    share: Share | None = None,
    placed: Collection[str] = (),
) -> Executed:
    """Copies the leaves.

    Args:
        copies: leaves to copy.
        reader: where their source extents are read.
        writer: where their target extents are written.
        journal: segments that an interrupted run has done are skipped, new ones are recorded.
        threads: number of worker threads.
        progress: told of bytes as they are written, those of a resumed run's journal at once.
        expected: digests of leaves in the source, checked for leaves whose values do not change.
        beside: other reads of the source by place, done when the copy comes there: what is read twice is then read
            from the disk once.
        share: divides what is to be done among several processes; None for this one alone.
        placed: leaves that are in place already; they are not read, and have no digest.

    Raises:
        MismatchError: a leaf does not have the digest that the source's manifest records.
        StorageError: a read or a write failed.
    """
    journal = Journal() if journal is None else journal
    if progress is not None:
        progress.start("copying", sum(copy.items * copy.source.itemsize for copy in copies if copy.name not in placed))
        progress.advance(sum(task.nbytes for task in tasks_of(copies, placed) if task.number in journal.done))
    pending = (task for task in tasks_of(copies, placed) if task.number not in journal.done)
    with contextlib.nullcontext(pending) if share is None else share(pending) as mine:
        run_tasks(mine, reader, writer, journal, threads, progress, beside)
    return collect(copies, journal.done, expected, placed)


def collect(
    copies: Sequence[LeafCopy],
    done: Mapping[int, Outcome],
    expected: Mapping[str, str] | None = None,
    placed: Collection[str] = (),
) -> Executed:
    """What became of the leaves, from what became of all their segments; arguments and errors as for `execute`."""
    digests: dict[str, str] = {}
    segments: dict[str, list[Outcome]] = {}
    for task in tasks_of(copies, placed):
        segments.setdefault(task.copy.name, []).append(done[task.number])
    for copy in copies:
        if copy.name in placed:
            continue
        digest = digests[copy.name] = combine([outcome.digest for outcome in segments[copy.name]])
        recorded = None if expected is None or copy.changes_values else expected.get(copy.name)
        if recorded is not None and recorded != digest:
            raise MismatchError(
                f"{copy.name} does not have the digest that the source's manifest records",
                hint="the source is damaged: fetch it again, or see `ckpt verify`",
            )
    rounded = (name for name, outcomes in segments.items() if not all(outcome.exact for outcome in outcomes))
    return Executed(digests, frozenset(rounded))


def run_tasks(
    tasks: Iterator[Task],
    reader: Reader,
    writer: Writer,
    journal: Journal,
    threads: int | None,
    progress: Progress | None = None,
    beside: Iterable[PlacedTask] = (),
) -> None:
    """Copies segments and records each in the journal; arguments and errors as for `execute`."""

    def act(task: Task) -> None:
        journal.record(task.number, run_task(task, reader, writer, progress))

    copying: Iterator[PlacedTask] = ((task.copy.source.first(), partial(act, task)) for task in tasks)
    run_threads(heapq.merge(beside, copying, key=itemgetter(0)), lambda task: task[1](), threads)


def run_threads(tasks: Iterator[T], act: Callable[[T], object], threads: int | None) -> None:
    """Calls `act` for each task from several threads; the first error stops all of them and is raised here."""
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not failures:
                with lock:
                    task = next(tasks, None)
                if task is None:
                    return
                act(task)
        except BaseException as error:
            failures.append(error)

    workers = [
        threading.Thread(target=work, name=f"ckpt-{i}", daemon=True) for i in range(threads or default_threads())
    ]
    started: list[threading.Thread] = []
    try:
        for worker in workers:
            try:
                worker.start()
            except RuntimeError as error:
                # The system gives no more threads: those that there are do all the work.
                if not started:
                    raise ResourceError(f"the system does not let a thread start: {error}") from error
                break
            started.append(worker)
        for worker in started:
            worker.join()
    except BaseException as interruption:
        failures.append(interruption)
        _wait_for(started)
        raise
    if failures:
        raise failures[0]


def _wait_for(workers: Sequence[threading.Thread]) -> None:
    """Returns when all have ended, which takes one task each: the files that they use are closed next."""
    for worker in workers:
        while worker.is_alive():
            # A second Ctrl-C is no reason to leave a thread behind that writes.
            with contextlib.suppress(KeyboardInterrupt):
                worker.join()


def run_task(task: Task, reader: Reader, writer: Writer, progress: Progress | None) -> Outcome:
    """Copies one segment."""
    with room_for(task.copy):
        return _copy_segment(task, reader, writer, progress)


def _copy_segment(task: Task, reader: Reader, writer: Writer, progress: Progress | None) -> Outcome:
    copy, digest, exact = task.copy, Digest(), True
    if copy.target is None:
        raise ValueError(f"{copy.name} has no target")
    for window in windows(task, reader):
        # One value that changed answers for the leaf: reading back what follows would only cost time.
        exact &= copy.target.drain(window, copy.source.dtype, writer, digest, check=exact)
        if progress is not None:
            progress.advance(len(window.data))
    return Outcome(digest.digest(), exact)


def windows(task: Task, reader: Reader) -> Iterator[Window]:
    """The values of a segment, window by window, in order. Each is valid until the next is asked for."""
    copy, itemsize = task.copy, task.copy.source.itemsize
    step = window_items(copy)
    nbytes = min(step, task.high - task.low) * itemsize
    buffer = scratch("window", nbytes) if nbytes <= WIDE else mapped(nbytes)
    for low in range(task.low, task.high, step):
        high = min(low + step, task.high)
        window = Window(buffer[: (high - low) * itemsize], low, high, itemsize)
        copy.source.fill(window, reader)
        yield window


def window_items(copy: LeafCopy) -> int:
    """Items of a window: whole blocks of encoded ends, and whole rows of strided extents where those fit."""
    ends = [end for end in (copy.source, copy.target) if end is not None]
    transposed = any(end.is_transposed for end in ends)
    itemsize = max(end.itemsize for end in ends)
    items = (WIDE if transposed else WINDOW) // itemsize
    block = math.lcm(copy.source.read_step, copy.target.write_step if copy.target else 1)
    if block > 1:
        return max(1, items // block) * block
    row = max(end.rows() for end in ends)
    if row <= items:
        return items - items % row
    return min(row, SEGMENT // itemsize) if transposed else items
