"""How the processes of one run hear that it failed: the first error of any of them ends all waiting and working."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from ckpt_tools.core.errors import CkptError, RankError
from ckpt_tools.engine.execute import Task
from ckpt_tools.engine.rendezvous import Message

RESUME = "run the same command again: it resumes, with any number of ranks"


class Fate:
    """The first thing that goes wrong in any process. Once there is one, every wait ends and no task is given out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.error: RankError | None = None

    def fail(self, error: RankError) -> None:
        """Only the first one counts."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def notify(self) -> None:
        """What some wait looks at has changed."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Whether the condition came true in time; raises what goes wrong meanwhile."""
        with self._changed:
            came = self._changed.wait_for(lambda: self.error is not None or condition(), seconds)
        self.check()
        return came

    def guard(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """The tasks, until something goes wrong."""
        for task in tasks:
            self.check()
            yield task


def failure(rank: int, who: str, error: BaseException) -> RankError:
    """What the others are told of an error."""
    if isinstance(error, RankError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return RankError(f"rank {rank} ({who}) was interrupted", hint=RESUME)
    message = error.message if isinstance(error, CkptError) else f"{type(error).__name__}: {error}"
    hint = error.hint if isinstance(error, CkptError) else None
    return RankError(f"rank {rank} ({who}) failed: {message}", hint=hint)


def gone(rank: int, who: str) -> RankError:
    return RankError(f"rank {rank} ({who}) went away: it, its machine or the network was cut off", hint=RESUME)


def described(error: RankError) -> Message:
    return {"failed": error.message, "hint": error.hint}


def told(message: Message) -> RankError:
    hint = message.get("hint")
    return RankError(str(message["failed"]), hint=None if hint is None else str(hint))
