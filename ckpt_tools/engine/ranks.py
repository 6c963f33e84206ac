"""One plan carried out by several processes, on one machine or many: each takes an even share of the bytes.

Every process makes the same plan. The first one owns the output: it takes the lock, makes the files, shares blocks with
the source, keeps the journal, which the others report every segment to, commits, and tells all others when something
goes wrong anywhere.
"""

from __future__ import annotations

import base64
import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ckpt_tools.core.errors import CkptError, RankError
from ckpt_tools.engine.execute import Copied, Journal, Outcome, Progress, Task, tasks_of
from ckpt_tools.engine.fate import Fate, described, failure, gone, told
from ckpt_tools.engine.files import FileWriter
from ckpt_tools.engine.plan import Plan, in_place
from ckpt_tools.engine.rendezvous import JOIN_SECONDS, Channel, Listener, Message, Place, connect, who_am_i
from ckpt_tools.engine.shares import RemoteJournal, agreement, packed, share_of, unpacked

FAREWELL_SECONDS = 10.0
"""How long the first process waits for the others to hear how the run ended."""

SYNC_SECONDS = 5.0
"""How often a process on another machine than the first syncs, and only then reports, what it has written."""

_ALONE = "start all ranks together; a process that is to run alone is started as `ckpt`, or without RANK and WORLD_SIZE"


class FirstRank:
    """The process that owns the output, and its connections to all others. Use it as a context around the whole run.

    Raises, wherever it is used:
        RankError: another process failed, went away, did not come, or has another plan.
    """

    rank = 0

    def __init__(self, place: Place, destination: Path, *, join_seconds: float = JOIN_SECONDS) -> None:
        self.world = place.world
        self._place = place
        self._destination = destination
        self._deadline = time.monotonic() + join_seconds
        self._fate = Fate()
        self._failing = threading.Lock()
        self._others: dict[int, _Other] = {}
        self._sizes: dict[int, int] = {}
        self._block: Message = {}
        self._journal = Journal()
        self._progress: Progress | None = None

    def __enter__(self) -> FirstRank:
        self._listener = Listener(self._place, self._destination)
        self._doorman = threading.Thread(target=self._let_in, name="ckpt-ranks", daemon=True)
        self._doorman.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        until = time.monotonic() + FAREWELL_SECONDS
        if error is not None:
            self._fail(failure(0, who_am_i(), error))
            # Those who come later than the failure should not wait for nothing.
            while isinstance(error, Exception) and self._missing() and time.monotonic() < min(until, self._deadline):
                time.sleep(0.05)
        self._listener.close()
        self._doorman.join()
        for other in self._others.values():
            other.channel.finish_sending()
        for other in self._others.values():
            other.thread.join(max(0.0, until - time.monotonic()))
            other.channel.close()

    def tell_block(self, block: int | None) -> None:
        """Tells all others, also those to come, the bytes of the blocks to plan for: what can be shared is found here.

        Another machine may have the source elsewhere, or find out otherwise, and all have to make the same plan.
        """
        with self._failing:
            self._block = {"block": block}
            self._tell_all(self._block)

    @contextlib.contextmanager
    def sharing(
        self,
        unfinished: Iterable[Task],
        *,
        mark: str,
        key: bytes,
        refused: frozenset[str],
        journal: Journal,
        progress: Progress | None,
    ) -> Iterator[Iterator[Task]]:
        """Gives the own share of the tasks; on leaving, every process's segments are done, synced and in the journal.

        Args:
            unfinished: tasks that are not done.
            mark: `agreement` of the plan.
            key: how the journal's file begins; the others know the directory by it.
            refused: files of the source that could not share their blocks; leaves in others are in place.
            journal: where the others' segments are recorded, too.
            progress: told of the others' bytes.
        """
        pending = list(unfinished)
        self._wait_for_all()
        self._fate.wait(lambda: all(other.mark for other in self._others.values()))
        for other in self._others.values():
            if other.mark != mark:
                raise RankError(
                    f"rank {other.rank} ({other.who}) sees another source or has other options than rank 0",
                    hint="give every rank the same command, the same version of ckpt and the same files",
                )
        self._sizes = {task.number: task.nbytes for task in pending}
        self._journal, self._progress = journal, progress
        begin = {"begin": packed(pending), "key": base64.b64encode(key).decode(), "refused": sorted(refused)}
        self._tell_all(begin)
        yield self._fate.guard(share_of(pending, 0, self.world))
        self._fate.wait(lambda: all(other.finished for other in self._others.values()))

    def conclude(self, copied: Copied) -> None:
        """Tells all others that the output is there, and what the copy came to.

        May be called in place of `sharing` where there was nothing left to do.
        """
        self._wait_for_all()
        self._tell_all({"end": asdict(copied) | {"rounded": sorted(copied.rounded)}})

    def fail(self, error: CkptError) -> None:
        """Tells all others of an error, before what they work in is removed."""
        self._fail(failure(0, who_am_i(), error))

    def _wait_for_all(self) -> None:
        if not self._fate.wait(lambda: not self._missing(), max(0.0, self._deadline - time.monotonic())):
            raise RankError(f"rank {_numbers(self._missing())} of {self.world} did not come", hint=_ALONE)

    def _missing(self) -> list[int]:
        return [rank for rank in range(1, self.world) if rank not in self._others]

    def _let_in(self) -> None:
        while self._missing():
            came = self._listener.accept()
            if came is None:
                return
            rank, who, channel = came
            if rank in self._others:
                channel.close()
                continue
            other = _Other(rank, who, channel)
            other.thread = threading.Thread(target=self._hear, args=(other,), name=f"ckpt-rank-{rank}", daemon=True)
            with self._failing:
                self._others[rank] = other
                if self._block:
                    other.tell(self._block)
                if self._fate.error is not None:
                    other.tell(described(self._fate.error))
            other.thread.start()
            self._fate.notify()
        self._listener.close()

    def _hear(self, other: _Other) -> None:
        """Listens to one process until it has nothing more to say."""
        try:
            while (message := other.channel.receive()) is not None:
                self._heard(other, message)
        except CkptError as error:
            self._fail(failure(0, who_am_i(), error))
        except (KeyError, TypeError, ValueError) as error:
            self._fail(RankError(f"rank {other.rank} ({other.who}) sent what is not understood: {error!r}"))
        if not other.finished:
            self._fail(gone(other.rank, other.who))

    def _heard(self, other: _Other, message: Message) -> None:
        if "failed" in message:
            self._fail(told(message))
        elif "ready" in message:
            other.mark = str(message["ready"])
        elif "finished" in message:
            other.finished = True
        else:
            for number, exact, digest in message["done"]:
                nbytes = self._sizes[number]
                self._journal.record(number, Outcome(bytes.fromhex(digest), bool(exact)))
                if self._progress is not None:
                    self._progress.advance(nbytes)
        self._fate.notify()

    def _fail(self, error: RankError) -> None:
        # Told before this process itself hears of it, and hangs up.
        with self._failing:
            if self._fate.error is None:
                self._tell_all(described(error))
                self._fate.fail(error)

    def _tell_all(self, message: Message) -> None:
        for other in list(self._others.values()):
            other.tell(message)


class _Other:
    """What the first process knows of another one."""

    thread: threading.Thread

    def __init__(self, rank: int, who: str, channel: Channel) -> None:
        self.rank = rank
        self.who = who
        self.channel = channel
        self.mark: str | None = None
        self.finished = False

    def tell(self, message: Message) -> None:
        # Whoever is gone is noticed by the thread that listens to it.
        with contextlib.suppress(OSError):
            self.channel.send(message)


class Begun(NamedTuple):
    """What a process is given to do.

    Attributes:
        key: how the journal's file begins.
        refused: files of the source that could not share their blocks.
        tasks: its share.
    """

    key: bytes
    refused: frozenset[str]
    tasks: Iterator[Task]


class OtherRank:
    """A process that helps the first one. Use it as a context around the whole run.

    Raises, wherever it is used:
        RankError: the first process did not come or went away, or another one failed.
    """

    def __init__(self, place: Place, destination: Path, *, join_seconds: float = JOIN_SECONDS) -> None:
        self.rank = place.rank
        self.world = place.world
        self._place = place
        self._destination = destination
        self._join_seconds = join_seconds
        self._fate = Fate()
        self._block: Message | None = None
        self._begin: Message | None = None
        self._end: Message | None = None

    def __enter__(self) -> OtherRank:
        self._channel = connect(self._place, self._destination, seconds=self._join_seconds)
        self._thread = threading.Thread(target=self._hear, name="ckpt-rank-0", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and error is not self._fate.error:
            with contextlib.suppress(OSError):
                self._channel.send(described(failure(self.rank, who_am_i(), error)))
        self._channel.finish_sending()
        self._thread.join(FAREWELL_SECONDS)
        self._channel.close()

    def block(self) -> int | None:
        """Bytes of the blocks to plan for, once the first process has said it."""
        self._fate.wait(lambda: self._block is not None or self._end is not None)
        return (self._block or {}).get("block")

    def begin(self, plan: Plan) -> Begun | None:
        """The own share, once the first process has made the files; None where it says that nothing is left to do."""
        self._send({"ready": agreement(plan)})
        self._fate.wait(lambda: self._begin is not None or self._end is not None)
        message = self._begin
        if message is None:
            return None
        numbers = unpacked(message["begin"])
        # Leaves that share their blocks are at most read, for their digests: written to, they would share no longer.
        refused = frozenset(message["refused"])
        copies = in_place(plan.copies, plan.sharing.placed(refused))
        pending = [task for task in tasks_of(copies) if task.number in numbers]
        tasks = self._fate.guard(share_of(pending, self.rank, self.world))
        return Begun(base64.b64decode(message["key"]), refused, tasks)

    def journal(self, writer: FileWriter, *, same_machine: bool) -> RemoteJournal:
        """A journal that the first process keeps."""
        return RemoteJournal(self._send, writer, 0.0 if same_machine else SYNC_SECONDS)

    def finish(self) -> Copied:
        """Says that the share is done and synced, and waits for the output; what the whole copy came to."""
        self._send({"finished": True})
        self._fate.wait(lambda: self._end is not None)
        end = (self._end or {"end": {}})["end"]
        return Copied(**end | {"rounded": frozenset(end.get("rounded", ()))})

    def _send(self, message: Message) -> None:
        try:
            self._channel.send(message)
        except OSError:
            # Its last words, if it had any, say more than a broken connection.
            self._thread.join(FAREWELL_SECONDS)
            if self._end is None:
                self._fate.fail(gone(0, "the first"))
                self._fate.check()

    def _hear(self) -> None:
        while (message := self._channel.receive()) is not None:
            if "failed" in message:
                self._fate.fail(told(message))
            elif "block" in message:
                self._block = message
            elif "begin" in message:
                self._begin = message
            elif "end" in message:
                self._end = message
            self._fate.notify()
        if self._end is None:
            self._fate.fail(gone(0, "the first"))


Ranks = FirstRank | OtherRank


@contextlib.contextmanager
def join_ranks(
    destination: str | Path, environment: Mapping[str, str] | None = None, *, seconds: float = JOIN_SECONDS
) -> Iterator[Ranks | None]:
    """The processes that carry out one plan together, for `convert` and `consolidate`; all of them call this.

        with join_ranks("out") as ranks:
            convert("Qwen/Qwen3-30B-A3B", "out", ranks=ranks)

    Args:
        destination: the directory that they make, on a file system that all of them share.
        environment: RANK, WORLD_SIZE and what else torchrun sets; None takes the process's.
        seconds: how long they wait for each other at the start.

    Yields:
        None for a process that is alone (no RANK, or a WORLD_SIZE of 1).

    Raises:
        UsageError: RANK and WORLD_SIZE do not fit each other.
        RankError: another process failed, went away or did not come.
    """
    place = Place.of_environment(os.environ if environment is None else environment)
    if place is None:
        yield None
        return
    with (FirstRank if place.rank == 0 else OtherRank)(place, Path(destination), join_seconds=seconds) as ranks:
        yield ranks


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:10])) + (", ..." if len(ranks) > 10 else "")
