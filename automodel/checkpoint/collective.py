"""Calls into torch's distributed checkpoint: with or without a process group, and errors in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_tools.core.errors import CkptError, StorageError


@contextmanager
def dcp_call(doing: str) -> Iterator[bool]:
    """Runs a call of DCP, which tells every rank of an error on any; the value is what its `no_dist` takes.

    Raises:
        CkptError: a rank failed; on every rank, that rank's error in one sentence instead of all ranks' tracebacks.
    """
    alone = not dist.is_initialized()
    try:
        # The filters belong to all threads, so that a save in the background leaves them alone.
        with warnings.catch_warnings() if alone else nullcontext():
            if alone:
                # One process without a group is a supported way to run, and is asked for by `no_dist`.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            yield alone
    except CheckpointException as failed:
        rank, (error, _) = next(iter(failed.failures.items()))
        message = f"{doing} failed on rank {rank}: {error}"
        if isinstance(error, CkptError):
            raise type(error)(message, hint=error.hint) from failed
        raise StorageError(message) from failed
