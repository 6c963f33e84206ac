"""The saves of a run, one after another, where there is the memory for it beside training.

Training stands still only while every process copies what it holds into host memory. A thread then writes the copies
as `save_checkpoint` always does, and agrees with the other processes through a group of its own, so that none of its
collectives can come between those of training.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import torch
import torch.distributed as dist

from automodel.checkpoint.host_memory import HostBuffer, available_memory, bytes_for
from automodel.checkpoint.save import Background
from automodel.logging import get_logger
from automodel.parallel.agree import gather_objects, is_first
from ckpt_tools.core.sizes import format_size

_logger = get_logger(__name__)

AsyncSave = Literal["auto", "on", "off"]


class Write(Protocol):
    """Writes one checkpoint: `save_checkpoint` with everything but its last argument."""

    def __call__(self, *, background: Background | None) -> None: ...


_MOST_OF_MEMORY = 0.8
"""Of the host memory that is available, what copies may take."""

_SLACK_BYTES = 64 << 10
"""For what grows from save to save: the counters in the training state."""

_ABANDON_SECONDS = 30.0
"""In which an abandoned save removes what it has written, where the disk answers."""


class Saver:
    """Saves checkpoints. Every process has one, and all call the same methods in the same order.

    A context: leaving it waits for the save that is under way, and a Ctrl-C meanwhile abandons that save. An error of
    it is raised, or logged where the context ends with another one.

    Args:
        mode: `auto` saves beside training on CUDA, `on` everywhere, `off` nowhere.
        device: of the model.
        timeout: after which a process that waits for another in a save gives up.
    """

    def __init__(self, mode: AsyncSave, device: torch.device, timeout: timedelta) -> None:
        self._wanted = mode == "on" or (mode == "auto" and device.type == "cuda")
        self._pinned = device.type == "cuda"
        self._timeout = timeout
        self._buffer: HostBuffer | None = None
        self._group: dist.ProcessGroup | None = None
        self._abandoned = threading.Event()
        self._running: _UnderWay | None = None

    def reserve(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take the memory for copies of `state`; where a process does not get it, training waits for every save."""
        if not self._wanted:
            return
        started = time.perf_counter()
        nbytes = bytes_for(state.values()) + _SLACK_BYTES
        obstacle = _shortage(nbytes) or self._take(nbytes)
        obstacles = [text for text in gather_objects(obstacle) if text is not None]
        if obstacles:
            self._release()
            if is_first():
                _logger.warning("training waits while checkpoints are written: %s", obstacles[0])
            return
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        if is_first():
            _logger.info(
                "training goes on while checkpoints are written, from %s of %shost memory in each process, "
                "taken in %.1f s",
                format_size(nbytes),
                "page-locked " if self._pinned else "",
                time.perf_counter() - started,
            )

    def save(self, directory: Path, state: Mapping[str, torch.Tensor], write: Write, *, wait: bool = False) -> None:
        """Save `state`, after the save before it is complete.

        Args:
            directory: path of the checkpoint, for messages.
            state: as it was reserved for. It may change when this returns.
            write: called here, or in the background with copies of `state`.
            wait: return when the checkpoint is complete.

        Raises:
            CkptError: this save failed, or the one before it; the same on all processes.
        """
        started = time.perf_counter()
        self.wait()
        if wait or self._buffer is None:
            write(background=None)
            _report(directory, started, time.perf_counter())
            return
        background = Background(self._buffer.copy(state), self._group, self._abandoned)
        copied = time.perf_counter()

        def work() -> None:
            write(background=background)
            _report(directory, started, copied)

        self._running = _UnderWay(directory, work)

    @property
    def has_failed(self) -> bool:
        """Whether `wait` would raise at once."""
        return self._running is not None and self._running.error is not None

    def wait(self) -> None:
        """Return when no save is under way; raises the error of the one that was."""
        running = self._running
        if running is None:
            return
        running.ended.wait()
        self._running = None
        if running.error is not None:
            raise running.error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        running = self._running
        if running is not None and not running.ended.is_set() and is_first():
            _logger.info("waiting until %s is complete; Ctrl-C abandons it", running.directory)
        try:
            self.wait()
        except KeyboardInterrupt:
            self._abandoned.set()
            if running is not None:
                running.ended.wait(_ABANDON_SECONDS)
            raise
        except Exception as failed:
            if error is None:
                raise
            # What ends the run says more than a save that may have failed because of it.
            _logger.error("%s", failed)
        finally:
            self._release()

    def _take(self, nbytes: int) -> str | None:
        """Makes the buffer; why not, where it cannot be made."""
        try:
            self._buffer = HostBuffer(nbytes, pinned=self._pinned)
        except (OSError, RuntimeError) as error:
            return f"{format_size(nbytes)} of host memory cannot be had on {socket.gethostname()}: {error}"
        return None

    def _release(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            buffer.release()


class _UnderWay:
    """A save in a thread of its own, a daemon: nothing waits for one that was abandoned."""

    def __init__(self, directory: Path, work: Callable[[], None]) -> None:
        self.directory = directory
        self.error: BaseException | None = None
        # An interrupted `Thread.join` takes the thread for ended (CPython issue 90882).
        self.ended = threading.Event()
        threading.Thread(target=self._run, args=(work,), name=f"saving {directory.name}", daemon=True).start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised by `wait`, in the thread that trains
            self.error = error
        finally:
            self.ended.set()


def _report(directory: Path, started: float, training_went_on: float) -> None:
    if is_first():
        _logger.info(
            "saved %s: training stood still for %.1f s, complete after %.1f s",
            directory,
            training_went_on - started,
            time.perf_counter() - started,
        )


def _shortage(nbytes: int) -> str | None:
    """Why this host cannot give all its processes the memory that they ask for, `nbytes` for this one."""
    me, available = socket.gethostname(), available_memory()
    # No process takes memory before all have looked.
    wanted = sum(part for host, part in gather_objects((me, nbytes)) if host == me)
    if available is None or wanted <= available * _MOST_OF_MEMORY:
        return None
    return (
        f"copies of all that is saved take {format_size(wanted)} on {me}, of whose memory {format_size(available)} is "
        "available"
    )
