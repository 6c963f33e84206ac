"""The dry run of `benchmarks/training.py`: the same code at tiny widths, in FP32, over processes on CPUs."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

TINY = {"case": "tiny", "sequence": 32, "warmup": 1, "steps": 3, "dtype": "float32", "lr": 3e-3}
LOSS_TOLERANCE, NORM_TOLERANCE = 3e-4, 2e-3
"""Of losses, which are rounded to 1e-4, and of the last gradient norm, as a share."""


def shrink(arguments: argparse.Namespace) -> None:
    """Give the run its tiny sizes; what is not about sizes stays as it was asked for."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name, value in TINY.items():
        setattr(arguments, name, value)


def forked(processes: int, rows: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of the first of `processes` processes that run `rows` together over gloo.

    They are forked, so that what takes longest, the imports, is done once.

    Raises:
        SystemExit: one of them failed; what it said is on stderr.
    """
    import training_trainee  # noqa: F401  (with it torch and transformers)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as scratch:
        ranks = [
            context.Process(target=_rank, args=(rank, processes, f"{scratch}/store", rows, sender))
            for rank in range(processes)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        sys.exit("a process of the dry run failed")
    return json.loads(receiver.recv()) if receiver.poll() else []


def _rank(rank: int, world_size: int, store: str, rows: Callable[[], Iterable[Any]], sender: Connection) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        if world_size > 1:
            dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
        found = list(rows())
        if rank == 0:
            sender.send(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Compare losses of each step, and the last gradient norm, with those of the first row of the same micro-batch.

    Raises:
        SystemExit: they differ.
    """
    first: dict[int, dict[str, Any]] = {}
    for row in rows:
        other = first.setdefault(row["micro_batch"], row)
        losses = max(abs(a - b) for a, b in zip(row["losses"], other["losses"], strict=True))
        norms = abs(row["grad_norm"] / other["grad_norm"] - 1)
        if not (losses <= LOSS_TOLERANCE and norms <= NORM_TOLERANCE):
            named = [f"{r['implementation']} (ep {r['ep']}): {r['losses']}, {r['grad_norm']}" for r in (other, row)]
            sys.exit(f"steps at micro-batch {row['micro_batch']} differ:\n" + "\n".join(named))
    print(f"losses of {len(rows)} rows agree within {LOSS_TOLERANCE:g}, gradient norms within {NORM_TOLERANCE:g}")
