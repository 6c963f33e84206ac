"""Small runs of every kind, to be killed and failed at each of their calls, and what must be true afterwards."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools import consolidate, convert
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import CkptError
from ckpt_tools.engine import execute
from ckpt_tools.engine.journal import JOURNAL
from ckpt_tools.engine.staging import Staging
from tests.checkpoints import write_repository
from tests.robustness.shim import Hook, Shim

SEGMENT = 2048
"""Bytes of a segment in these runs, so that tensors of some kB have several."""

Tree = dict[str, bytes | None]
"""Content of every file below a directory by relative path, where a link leads, None for a directory."""


@dataclass(frozen=True)
class Scenario:
    """One run.

    Attributes:
        verb: `convert` or `consolidate`.
        file_format: of a converted output.
        mesh: that it is made for.
        overwrite: whether it replaces an older output.
        exchanges: whether the file system can exchange directories in one step.
        shares: whether tensors are large enough to share their blocks, where `sharing_disk` lets them.
    """

    verb: str
    file_format: str = "dcp"
    mesh: str | None = None
    overwrite: bool = False
    exchanges: bool = True
    shares: bool = False

    def __str__(self) -> str:
        words = [self.verb, self.file_format if self.verb == "convert" else "", self.mesh or ""]
        words += ["overwrite" if self.overwrite else "", "" if self.exchanges else "two steps"]
        words += ["shares"] if self.shares else []
        return " ".join(filter(None, words))


SCENARIOS = (
    Scenario("convert"),
    Scenario("convert", "safetensors", mesh="dp_shard=2"),
    Scenario("consolidate"),
    Scenario("convert", overwrite=True),
    Scenario("consolidate", overwrite=True),
    Scenario("convert", "safetensors", overwrite=True, exchanges=False),
    Scenario("convert", overwrite=True, shares=True),
)


class Stage:
    """A directory in which one scenario is played.

    Args:
        root: empty directory.
        scenario: the run.

    Attributes:
        root: that directory.
        out: the output; nothing but it and the source may be left beside it.
        old: the older output, empty for none.
        new: what the run makes.
        tasks: segments of the run.
    """

    def __init__(self, root: Path, scenario: Scenario) -> None:
        self.scenario = scenario
        self.out = root / "work" / "out"
        self.root = root
        self._source = _source(root / "source", seed=1, rows=12 if scenario.shares else 3)
        if scenario.verb == "consolidate":
            convert(self._source, root / "native")
            self._source = root / "native"
        self.old: Tree = {}
        if scenario.overwrite:
            older = _source(root / "older", seed=2, layers=1)
            (older / "extra").mkdir()
            (older / "extra" / "notes.txt").write_text("of the older output")
            convert(older, root / "old")
            self.old = tree(root / "old")
        self.tasks = 0
        with counted_tasks() as count:
            self.out.parent.mkdir()
            self.run()
            self.tasks = count()
        self.new = tree(self.out)

    def reset(self, *, overwrite: bool | None = None) -> None:
        """The output as it is before a run: older, or absent."""
        self.clear()
        if self.scenario.overwrite if overwrite is None else overwrite:
            grow(self.out, self.old)

    def clear(self) -> None:
        """Removes everything beside the source."""
        for path in self.out.parent.iterdir():
            remove(path)

    def run(self, **changes: Any) -> None:
        """The run, in one thread."""
        options = {"threads": 1, "overwrite": self.scenario.overwrite, **changes}
        if self.scenario.verb == "consolidate":
            consolidate(self._source, self.out, **options)
        else:
            convert(self._source, self.out, file_format=self.scenario.file_format, mesh=self.scenario.mesh, **options)

    def shim(self, hook: Hook) -> contextlib.AbstractContextManager[object]:
        """Calls of this run only go through the hook, on a file system that can do what the scenario says."""
        stack = contextlib.ExitStack()
        if not self.scenario.exchanges:
            stack.enter_context(_without_exchange())
        stack.enter_context(Shim(hook))
        return stack

    def state(self) -> str:
        """Whether the output is `absent`, `old` or `new`; anything else fails the test."""
        if not os.path.lexists(self.out):
            return "absent"
        found = tree(self.out)
        # The last thing that a run removes, and hidden: its presence says that cleaning up is all that is left.
        found.pop(JOURNAL, None)
        if found == self.new:
            return "new"
        assert found == self.old, f"{sorted(found)} is neither the old nor the new output"
        return "old"

    def beside(self) -> list[str]:
        """What lies beside the output."""
        return sorted(path.name for path in self.out.parent.iterdir() if path != self.out)


def _source(root: Path, *, seed: int, layers: int = 2, rows: int = 3) -> Path:
    """A repository with tensors of none, one and several segments, in two files."""
    tensors = {f"layer.{i}.weight": (DTYPES["BF16"], (rows, 1024)) for i in range(layers)}
    tensors |= {"scalar": (DTYPES["F32"], ()), "empty": (DTYPES["F32"], (0, 3)), "odd": (DTYPES["U8"], (77,))}
    return write_repository(root, tensors, {"model_type": "unheard-of"}, max_shard_size=8000, seed=seed)


def tree(root: Path) -> Tree:
    """Everything below a directory, links not followed."""

    def content(path: Path) -> bytes | None:
        if path.is_symlink():
            return os.fsencode(os.readlink(path))
        return None if path.is_dir() else path.read_bytes()

    return {str(path.relative_to(root)): content(path) for path in root.rglob("*")}


def grow(root: Path, content: Tree) -> None:
    """Makes a directory with that content."""
    root.mkdir()
    for name, data in sorted(content.items()):
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            remove(inner)
        path.rmdir()
    else:
        path.unlink()


@contextlib.contextmanager
def _without_exchange() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt_tools.engine.staging._exchange_in_kernel", lambda *_: False)
        yield


@contextlib.contextmanager
def counted_tasks() -> Iterator[Callable[[], int]]:
    """Counts the segments that are copied inside, also in children that are killed."""
    shared = mmap.mmap(-1, 8)
    real = execute.run_task

    def counting(*arguments: Any) -> Any:
        outcome = real(*arguments)
        shared[:] = struct.pack("<q", count() + 1)
        return outcome

    def count() -> int:
        return int(struct.unpack("<q", shared[:])[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "run_task", counting)
        yield count


@contextlib.contextmanager
def interruption(*, after: int) -> Iterator[None]:
    """Ends the run inside with Ctrl-C after some segments."""
    real, left = execute.run_task, [after]

    def dying(*arguments: Any) -> Any:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "run_task", dying)
        try:
            yield
        except KeyboardInterrupt:
            return
    raise AssertionError("the run was over before it was interrupted")


def in_child(act: Callable[[], object], *, seconds: float = 60) -> int:
    """Exit code of `act` in a forked process: 0, that of a `CkptError`, 70 for others, -9 when it was killed."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            act()
            code = 0
        except CkptError as error:
            code = error.exit_code
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return ended(child, seconds=seconds)


def ended(child: int, *, seconds: float = 60) -> int:
    """Exit code of a forked process, which must end in time."""
    import select

    watched = os.pidfd_open(child)
    try:
        ready, _, _ = select.select([watched], [], [], seconds)
        if not ready:
            os.kill(child, 9)
        _, status = os.waitpid(child, 0)
        assert ready, f"a run did not end in {seconds} s"
    finally:
        os.close(watched)
    return os.waitstatus_to_exitcode(status)


def staging_of(out: Path) -> Path:
    """Where a run makes its output."""
    return Staging(out, overwrite=True).path
