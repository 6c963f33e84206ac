"""Tensor bytes of a remote checkpoint: blocks that several requests fetch ahead of the threads, in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from ckpt_tools.core.errors import StorageError
from ckpt_tools.formats.remote import REQUESTS, RemoteFiles

BLOCK = 2 << 20
"""Bytes of one request: large against what a request costs, small enough for many to be held."""

AHEAD = 12
"""Blocks asked for beyond the one that is read; plans read files forward."""

ROOM = 128 << 20
"""Upper bound of the bytes in blocks, on top of what the threads hold."""


class RangeReader:
    """Byte ranges of remote files. Safe to use from several threads."""

    def __init__(self, remote: RemoteFiles) -> None:
        self._remote = remote
        self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="ckpt-range")
        self._blocks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._done: dict[tuple[str, int], None] = {}
        self._lock = threading.Lock()
        self._files: dict[str, None] = {}

    def read(self, file: str, position: int, into: memoryview) -> None:
        """Fills `into` from byte `position` of `file` on."""
        end = position + len(into)
        if end > self._remote.versions[file].size:
            raise StorageError(f"{self._remote.url}/{file} ends before a tensor does", hint="upload the file again")
        while position < end:
            number, skip = divmod(position, BLOCK)
            data = memoryview(self._block(file, number).result())[skip : skip + len(into)]
            into[: len(data)] = data
            into, position = into[len(data) :], position + len(data)
            if position % BLOCK == 0:
                with self._lock:
                    self._done.update({(file, number): None} if (file, number) in self._blocks else {})

    def check_unchanged(self) -> None:
        """Raises `InputChangedError` when a file that was read is no longer the one whose header was."""
        self._remote.check_unchanged(list(self._files))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._blocks.clear()

    def _block(self, file: str, number: int) -> Future[bytes]:
        """The block, asked for together with those after it."""
        size = self._remote.versions[file].size
        with self._lock:
            self._files[file] = None
            # Leaves that lie in many files at once share the room, and no block gives way to one that may be needed.
            files = len({name for name, _ in self._blocks}) or 1
            free = ROOM // BLOCK - len(self._blocks) + len(self._done)
            beyond = max(0, min(AHEAD, free - 1, ROOM // BLOCK // (2 * files)))
            for ahead in range(number, min(number + 1 + beyond, -(-size // BLOCK))):
                if (file, ahead) not in self._blocks:
                    begin = ahead * BLOCK
                    future = self._pool.submit(self._remote.fetch, file, begin, min(begin + BLOCK, size))
                    self._blocks[file, ahead] = future
            found = self._blocks[file, number]
            self._blocks.move_to_end((file, number))
            while len(self._blocks) > ROOM // BLOCK:
                oldest = next(iter(self._done), None) or next(iter(self._blocks))
                self._done.pop(oldest, None)
                self._blocks.pop(oldest, None)
        return found
