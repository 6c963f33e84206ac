"""The CRC-32 that `torch.save` leaves of every tensor in a DCP file: the only guard of a checkpoint without a manifest.

`verify` checks them, and so does a copy out of a checkpoint that has no digests of ours, while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ckpt_tools.core.errors import MismatchError, listed
from ckpt_tools.core.scratch import scratch
from ckpt_tools.core.tensors import Checksum
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.execute import PlacedTask, Progress, run_threads
from ckpt_tools.engine.files import FileReader

try:
    from isal.isal_zlib import crc32  # eight times as fast, where it is installed
except ImportError:
    from zlib import crc32

BUFFER = 256 << 10
"""Bytes that a thread reads at once: they stay in a core's cache for the checksum."""


class ChecksumPass:
    """Compares parts of files with the checksums that are recorded of them.

    Args:
        reader: of the files.
        checksums: what is recorded.
        progress: told of bytes as they are read.
    """

    def __init__(self, reader: FileReader, checksums: Sequence[Checksum], progress: Progress | None = None) -> None:
        self._reader = reader
        self._checksums = sorted(checksums, key=lambda checksum: (checksum.file, checksum.position))
        self._progress = progress
        self._wrong: list[str] = []

    def tasks(self) -> Iterator[PlacedTask]:
        """The comparisons in the order of the files, to be done by any threads."""
        for checksum in self._checksums:
            yield (checksum.file, checksum.position), partial(self._compare, checksum)

    def finish(self, root: Path) -> None:
        """Raises `MismatchError` if a comparison failed."""
        if self._wrong:
            raise MismatchError(
                f"{root}: {len(self._wrong):,} pieces do not have the CRC-32 that was saved with them\n"
                + listed(sorted(self._wrong)),
                hint="the files were damaged after training saved them; copy them again, or use another checkpoint",
            )

    def _compare(self, checksum: Checksum) -> None:
        found = 0
        for at in range(0, checksum.length, BUFFER):
            data = scratch("checksum", min(BUFFER, checksum.length - at))
            self._reader.read(checksum.file, checksum.position + at, data)
            found = crc32(data, found)
            if self._progress is not None:
                self._progress.advance(len(data))
        if found != checksum.crc:
            self._wrong.append(f"{checksum.tensor}, in {checksum.file} at byte {checksum.position:,}")


def verify_checksums(checkpoint: Checkpoint, *, threads: int | None, progress: Progress | None) -> list[str]:
    """Compares every checksum that the files record; returns what was compared, in words.

    Raises:
        MismatchError: a tensor's bytes do not have their checksum.
    """
    checksums = checkpoint.store.checksums
    if not checksums:
        return []
    if progress is not None:
        progress.start("checking", sum(checksum.length for checksum in checksums))
    with FileReader(checkpoint.root) as reader:
        checks = ChecksumPass(reader, checksums, progress)
        run_threads(checks.tasks(), lambda task: task[1](), threads)
        reader.check_unchanged()
    checks.finish(checkpoint.root)
    return [f"checksums: {len(checksums):,} pieces have the CRC-32 that torch saved with them"]
