"""What all processes know of each other: their values, and their errors, which are raised on all of them within seconds
instead of a hang until a collective times out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ckpt_tools.core.errors import CkptError


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list:
    """The values of all processes of the group, None for the default one; this process's alone where there is none."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def least(value: int) -> int:
    """The smallest of the values of all processes, for what they agree on in every step.

    One number costs less than objects: over gloo 0.3 instead of 1.1 ms for 2 processes, 3.7 instead of 28 ms for 8 on
    two cores. Where the group has no backend for CPU tensors it waits for the device.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    number = torch.tensor(value, device="cpu" if "cpu:" in dist.get_backend_config() else "cuda")
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return int(number)


@contextmanager
def raise_together(doing: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """All processes run the block, then agree: if any failed, every one raises.

    The block must not contain collectives that a failure in it would leave others waiting in. Without a process group
    errors pass through unchanged.

    Args:
        doing: what the block does, for the message, for example `loading the parameters`.
        group: of all processes, to agree in; None is the default one.

    Raises:
        the block's own error on the processes where it failed, `CkptError` naming those processes on the others.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # whatever it is, the other processes have to hear of it first
        error = caught
    reports = gather_objects(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    failed = {rank: report for rank, report in enumerate(reports) if report is not None}
    if failed:
        first, report = next(iter(failed.items()))
        ranks = ", ".join(map(str, failed))
        raise CkptError(f"{doing} failed on rank {ranks}; rank {first} says: {report}")
