"""The processes of a training job: joining the group that torchrun started, and leaving it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


@contextmanager
def process_group(timeout_minutes: float) -> Iterator[torch.device]:
    """The default process group for the duration of a run, and the device of this process.

    Under torchrun all its processes join; otherwise this process is a group of its own, without a network address, so
    that mixed precision works the same. A group that the caller made is used and left as it is.

    Args:
        timeout_minutes: after which a collective that a process does not join fails.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        yield device
        return
    # Objects and checkpoint plans travel over gloo, tensors over NCCL.
    options = {
        "backend": "cpu:gloo,cuda:nccl" if cuda else "gloo",
        "timeout": timedelta(minutes=timeout_minutes),
        "device_id": device if cuda else None,
    }
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(**options)
    else:
        dist.init_process_group(**options, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    except BaseException:
        # The others may be waiting in a collective that this process will not join: end, and let torchrun end them.
        if dist.get_world_size() == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def terminal_log(speaks: bool) -> Iterator[None]:
    """Messages of the training half on stderr during a run, unless the program has set up logging itself.

    Args:
        speaks: False lets only errors through; the others say what the first process says.
    """
    logger = logging.getLogger("automodel")
    if logger.hasHandlers():
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if speaks else logging.ERROR)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
