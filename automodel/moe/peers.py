"""Memory that the processes of an expert-parallel group on one host read from each other.

`SymmetricPeers` holds two buffers a process, one for tokens on their way to experts and one for results on their way
home. In every exchange, a process writes its buffer, all meet at a barrier on the device, and then read; the next
exchange uses the other buffer. So no buffer is written again before a barrier that its readers reach after reading.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
import time
import weakref
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from automodel.kernels.packages import is_installed
from automodel.parallel.agree import gather_objects
from ckpt_tools.core.errors import CkptError

TIMEOUT_SECONDS = 600.0
"""How long a process waits for another one before that counts as lost."""


class PeerBuffer(Protocol):
    """One buffer of every process of a group.

    Attributes:
        own: uint8 [bytes], this process's.
        table: int64 [W], addresses of all of them, on the device.
    """

    own: torch.Tensor
    table: torch.Tensor

    def barrier(self) -> None:
        """Queue a wait until every process of the group has got here; what they wrote before is visible after."""
        ...


class Peers(Protocol):
    """What the processes of a group offer each other; all of them make the same calls in the same order.

    Attributes:
        rank, size: of the group.
    """

    rank: int
    size: int

    def greatest(self, number: int) -> int:
        """The greatest of the numbers that the processes give; hosts meet here, devices do not."""
        ...

    def outward(self, size: int) -> PeerBuffer:
        """The buffer of tokens on their way to experts, of at least `size` bytes, the same on all processes."""
        ...

    def homeward(self, size: int) -> PeerBuffer:
        """The buffer of results on their way to their tokens."""
        ...

    def addresses(self) -> list[int]:
        """Where this process's buffers lie; others when one had to be made larger."""
        ...


class Mailbox:
    """Numbers exchanged by the processes of one host through a file in memory, within microseconds.

    A process writes its number together with that of the round, as one word. Rounds alternate between two words: a
    process is at most one round ahead of another, because it waits for all.

    Args:
        path: a file of `Mailbox.bytes_for(size)` zeros, the same for all processes.
    """

    def __init__(self, path: Path, rank: int, size: int) -> None:
        self._rank, self._size, self._round = rank, size, 0
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self.bytes_for(size))
        self._words = memoryview(self._map).cast("q")

    @staticmethod
    def bytes_for(size: int) -> int:
        return 16 * size

    def greatest(self, number: int) -> int:
        """The greatest of the numbers (0 to 2^32 - 1) that the processes give in this round.

        Raises:
            CkptError: a process did not come within `TIMEOUT_SECONDS`.
        """
        self._round += 1
        base = self._size * (self._round % 2)
        self._words[base + self._rank] = self._round << 32 | number
        return max(self._wait_for(rank, base) for rank in range(self._size))

    def _wait_for(self, rank: int, base: int) -> int:
        looks, deadline = 0, 0.0
        while (word := self._words[base + rank]) >> 32 != self._round:
            looks += 1
            if looks % 1000 == 0:
                deadline = deadline or time.monotonic() + TIMEOUT_SECONDS
                if time.monotonic() > deadline:
                    raise CkptError(
                        f"process {rank} of the expert-parallel group sent no tokens for {TIMEOUT_SECONDS:g} s",
                        hint="its own output says why it stopped",
                    )
                time.sleep(0)
        return word & 0xFFFFFFFF


class SymmetricBuffer:
    """A buffer in torch's symmetric memory; made by all processes of the group together."""

    def __init__(self, size: int, peers: Peers, group_name: str, device: torch.device) -> None:
        from torch._C._distributed_c10d import _SymmetricMemory
        from torch.distributed import _symmetric_memory

        # An allocation of its own: what torch takes from a pool begins somewhere in a peer's block.
        self.own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
        # Its signals are cleared on a stream of torch's choosing; nobody may signal before.
        torch.cuda.synchronize(device)
        self._handle = _symmetric_memory.rendezvous(self.own, group_name)
        starts = [self._handle.get_buffer(peer, (size,), torch.uint8).data_ptr() for peer in range(peers.size)]
        if starts[peers.rank] != self.own.data_ptr():
            raise CkptError("torch's symmetric memory does not begin where its allocation does")
        self.table = torch.tensor(starts, dtype=torch.int64, device=device)

    def barrier(self) -> None:
        self._handle.barrier(channel=0, timeout_ms=int(1e3 * TIMEOUT_SECONDS))


class SymmetricPeers:
    """`Peers` on CUDA GPUs of one host that can read each other's memory."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        # Its name, because groups are what opened peers are remembered by.
        self._group_name, self._device = group.group_name, device
        self._mailbox = _open_mailbox(group)
        self._buffers: dict[str, SymmetricBuffer] = {}
        self._stream: torch.cuda.Stream | None = None

    def greatest(self, number: int) -> int:
        return self._mailbox.greatest(number)

    def outward(self, size: int) -> SymmetricBuffer:
        if not torch.cuda.is_current_stream_capturing():
            # A graph is in the order of the stream that it is replayed on.
            self._follow(torch.cuda.current_stream(self._device))
        return self._at_least("outward", size)

    def homeward(self, size: int) -> SymmetricBuffer:
        return self._at_least("homeward", size)

    def addresses(self) -> list[int]:
        return [buffer.own.data_ptr() for buffer in self._buffers.values()]

    def _follow(self, stream: torch.cuda.Stream) -> None:
        """Go on with exchanges on `stream`: their order is that of one stream."""
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _at_least(self, name: str, size: int) -> SymmetricBuffer:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.own.numel() < size:
            if buffer is not None:
                # Others may still read it.
                torch.cuda.synchronize(self._device)
                self._mailbox.greatest(0)
                del self._buffers[name], buffer
            buffer = self._buffers[name] = SymmetricBuffer(size, self, self._group_name, self._device)
        return buffer


_opened: weakref.WeakKeyDictionary[dist.ProcessGroup, SymmetricPeers | str] = weakref.WeakKeyDictionary()


def open_peers(group: dist.ProcessGroup, device: torch.device) -> Peers | str:
    """The peers of this process in `group`, or why it has none: a sentence, the same on all processes.

    Every process of the group calls it together; it is decided once for a group.
    """
    if group not in _opened:
        _opened[group] = _obstacle(group, device) or _try_to_open(group, device)
    return _opened[group]


def host_obstacle(device: torch.device) -> str | None:
    """Why no processes on this host, one a GPU, can have peers, as far as one of them alone can tell; else None."""
    if obstacle := _device_obstacle(device):
        return obstacle
    devices = range(torch.cuda.device_count())
    if len(devices) < 2:
        return "symmetric dispatch is between GPUs, and this host has one"
    apart = any(not _reaches(one, other) for one in devices for other in devices if one != other)
    return f"symmetric dispatch needs peer access between GPUs {[*devices]}" if apart else None


def _device_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "symmetric dispatch needs CUDA"
    return None if is_installed("triton") else "symmetric dispatch needs triton, which is not installed"


def _obstacle(group: dist.ProcessGroup, device: torch.device) -> str | None:
    if obstacle := _device_obstacle(device):
        return obstacle
    visible = torch.cuda.device_count()
    everyone = gather_objects((host_name(), device.index, visible), group)
    hosts = {host for host, _, _ in everyone}
    if len(hosts) > 1:
        return f"symmetric dispatch needs the ep axis on one host, and it is on {len(hosts)}"
    devices = [index for _, index, _ in everyone]
    if len(set(devices)) < len(devices) or {count for _, _, count in everyone} != {visible}:
        return "symmetric dispatch needs processes that see each other's GPUs (CUDA_VISIBLE_DEVICES hides them)"
    unreachable = [other for other in devices if other != device.index and not _reaches(device.index, other)]
    reports = [report for report in gather_objects(unreachable, group) if report]
    return f"symmetric dispatch needs peer access between GPUs {devices}" if reports else None


def _try_to_open(group: dist.ProcessGroup, device: torch.device) -> SymmetricPeers | str:
    """A small buffer shows whether symmetric memory works here; all processes conclude the same."""
    failure, peers = None, None
    try:
        peers = SymmetricPeers(group, device)
        peers.homeward(1 << 16)
    except (OSError, RuntimeError, CkptError) as error:
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    failures = [report for report in gather_objects(failure, group) if report]
    if peers is None or failures:
        return f"symmetric memory cannot be opened here: {failures[0]}"
    return peers


def _open_mailbox(group: dist.ProcessGroup) -> Mailbox:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    path = None
    if rank == 0:
        memory = Path("/dev/shm")
        descriptor, name = tempfile.mkstemp(prefix="automodel-", dir=memory if memory.is_dir() else None)
        os.truncate(descriptor, Mailbox.bytes_for(size))
        os.close(descriptor)
        path = Path(name)
    path = gather_objects(path, group)[0]
    mailbox = Mailbox(path, rank, size)
    gather_objects(None, group)
    if rank == 0:
        path.unlink()
    return mailbox


def host_name() -> str:
    """A name that no other host has, however many are called the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (boot.read_text(encoding="ascii").strip() if boot.is_file() else "")


def _reaches(device: int, other: int) -> bool:
    return bool(torch.cuda.can_device_access_peer(device, other))
