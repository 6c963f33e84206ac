"""Several ranks of a gloo process group, each a process of its own, for tests of parallel code.

Ranks are forked from a fork server that has imported torch and nothing else happened in: a rank then costs
milliseconds, and no thread of the test process can leave a lock behind in it. Functions, results and nested functions
travel by pickle. An exception on any rank fails the test with that rank's traceback, and ranks that hang are killed.
"""

from __future__ import annotations

import importlib
import io
import marshal
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 90
PRELOADED = ["torch", "transformers", "automodel.training", "tests.automodel.tiny", "pytest"]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `world_size` ranks.

    Raises:
        AssertionError: a rank raised (its traceback is in the message) or did not finish.
    """
    outcomes = run_ranks_outcomes(world_size, function, *args)
    failed = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(outcomes) if error]
    assert not failed, "\n".join(failed)
    return [result for result, _ in outcomes]


def run_ranks_outcomes(world_size: int, function: Callable[..., Any], *args: Any) -> list[tuple[Any, str | None]]:
    """(result, traceback or None) of each rank, for tests in which ranks are meant to fail."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # Read when the server starts: threads of a BLAS would not survive the fork.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    work = _dumps((function, args))
    with tempfile.TemporaryDirectory() as scratch:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, world_size, scratch, sender, work))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        outcomes = [_outcome(*pair, deadline) for pair in zip(pipes, processes, strict=True)]
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
    return outcomes


def _outcome(receiver: Any, process: Any, deadline: float) -> tuple[Any, str | None]:
    try:
        if receiver.poll(max(0.0, deadline - time.monotonic())):
            return pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join(5)
        return None, f"died with exit code {process.exitcode}"
    process.kill()
    return None, f"did not finish in {TIMEOUT_SECONDS} seconds"


def _rank(rank: int, world_size: int, scratch: str, sender: Any, work: bytes) -> None:
    # No GPU, also where there is one: these ranks talk over gloo, and may be more than the GPUs.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(work)
        dist.init_process_group(
            "gloo", store=dist.FileStore(f"{scratch}/store", world_size), rank=rank, world_size=world_size
        )
        outcome = (function(*args), None)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        outcome = (None, traceback.format_exc())
    # By value: torch's own reducers would leave the tensors in a process that is about to end.
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    # Skips destructors: a half-dead process group may block in them.
    os._exit(0 if outcome[1] is None else 1)


class _Pickler(pickle.Pickler):
    """Pickles nested functions too, by their code and what they close over."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, FunctionType) and "<" in value.__qualname__:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return _function, (marshal.dumps(value.__code__), value.__module__, value.__defaults__, cells)
        return NotImplemented


def _function(code: bytes, module: str, defaults: tuple[Any, ...] | None, cells: list[Any]) -> FunctionType:
    names = importlib.import_module(module).__dict__
    return FunctionType(marshal.loads(code), names, None, defaults, tuple(CellType(cell) for cell in cells))


def _dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream).dump(value)
    return stream.getvalue()
