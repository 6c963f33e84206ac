"""Host memory that tensors are copied into, so that training can change them while the copies are written.

It is taken once, every page of it, and used again by every save: memory that is not there is found out at the
beginning of a run, and no save waits for pages. What is copied from CUDA needs it page-locked, or the copy would go at
a fraction of the bus's speed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import torch

from automodel.parallel.local import local_part
from ckpt_tools.core.scratch import mapped

_ALIGNMENT = 512
"""Of the copies, in bytes: that of CUDA's own allocations."""

_PIECE = 256 << 20
"""Bytes that a thread touches at a time while memory is taken."""

_THREADS = 8

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class HostBuffer:
    """Memory of this process for copies of tensors.

    Args:
        nbytes: of the memory, as `bytes_for` counts them.
        pinned: lock it for copies from CUDA.

    Raises:
        OSError: the system does not map so much memory.
        RuntimeError: CUDA cannot lock it.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self._memory = torch.frombuffer(mapped(nbytes), dtype=torch.uint8)
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            # Locking would touch the pages one by one in one thread.
            for _ in pool.map(torch.Tensor.zero_, self._memory.split(_PIECE)):
                pass
        self._pinned = False
        if pinned:
            _lock(self._memory)
            self._pinned = True

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this process holds of each tensor, as it is now; the copies before it are overwritten."""
        parts = {name: local_part(tensor) for name, tensor in tensors.items()}
        copies = {}
        for (name, part), begin in zip(parts.items(), _positions(parts.values()), strict=False):
            place = self._memory[begin : begin + part.nbytes].view(part.dtype).view(part.shape)
            copies[name] = place.copy_(part, non_blocking=True)
        if self._pinned:
            torch.cuda.current_stream().synchronize()
        return copies

    def release(self) -> None:
        """Unlock the memory; it goes back to the system with the last copy in it."""
        if self._pinned:
            self._pinned = False
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())))


def _lock(memory: torch.Tensor) -> None:
    try:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
    except RuntimeError:
        # CUDA reports the failure to the next launch as well, which shall not be one of the model's.
        with suppress(RuntimeError):
            torch.zeros((), device="cuda")
        raise


def bytes_for(tensors: Iterable[torch.Tensor]) -> int:
    """Memory that `HostBuffer.copy` needs for what this process holds of these tensors."""
    *_, end = _positions(map(local_part, tensors))
    return end


def _positions(parts: Iterable[torch.Tensor]) -> Iterator[int]:
    """Where the copy of each begins, and where the last one ends."""
    return accumulate((-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts), initial=0)


def available_memory() -> int | None:
    """Bytes that processes of this machine, or of this container, can still take; None where nobody says."""
    if not _MEMINFO.is_file():
        return None
    found = [_field(_MEMINFO, "MemAvailable:") * 1024]
    limit = _CGROUP / "memory.max"
    if limit.is_file() and (most := limit.read_text(encoding="ascii").strip()) != "max":
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        # The kernel takes back cached files before it refuses memory.
        found.append(int(most) - used + _field(_CGROUP / "memory.stat", "inactive_file"))
    return min(found)


def _field(path: Path, name: str) -> int:
    """The number after `name` at the beginning of a line."""
    lines = path.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
