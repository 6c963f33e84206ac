"""Peers for processes without GPUs: files in memory that all of them map, and gloo's barrier."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from automodel.moe.peers import Mailbox


class FileBuffer:
    def __init__(self, name: str, size: int) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        Path(f"{name}-{rank}").write_bytes(bytes(size))
        dist.barrier()
        self._all = [
            torch.from_file(f"{name}-{peer}", shared=True, size=size, dtype=torch.uint8) for peer in range(world)
        ]
        self.own = self._all[rank]
        self.table = torch.tensor([buffer.data_ptr() for buffer in self._all])

    def barrier(self) -> None:
        dist.barrier()


class FilePeers:
    """The default group's processes, through files in a directory that all of them know.

    Attributes:
        made: how many times a buffer was made, or made larger.
    """

    def __init__(self, directory: str) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._directory = directory
        if self.rank == 0:
            Path(directory, "mailbox").write_bytes(bytes(Mailbox.bytes_for(self.size)))
        dist.barrier()
        self._mailbox = Mailbox(Path(directory, "mailbox"), self.rank, self.size)
        self._buffers: dict[str, FileBuffer] = {}
        self.made = 0

    def greatest(self, number: int) -> int:
        return self._mailbox.greatest(number)

    def outward(self, size: int) -> FileBuffer:
        return self._at_least("outward", size)

    def homeward(self, size: int) -> FileBuffer:
        return self._at_least("homeward", size)

    def addresses(self) -> list[int]:
        return [buffer.own.data_ptr() for buffer in self._buffers.values()]

    def _at_least(self, name: str, size: int) -> FileBuffer:
        if name not in self._buffers or len(self._buffers[name].own) < size:
            self.made += 1
            self._buffers[name] = FileBuffer(f"{self._directory}/{name}-{self.made}", size)
        return self._buffers[name]
