"""The CRC-32 that `torch.save` leaves of every tensor in a DCP file: the only guard of a checkpoint without a manifest.

`verify` checks them, and so does a copy out of a checkpoint that has no digests of ours, while it runs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path

from ckpt_tools.core.errors import MismatchError, listed
from ckpt_tools.core.scratch import scratch
from ckpt_tools.core.tensors import Checksum
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.execute import PlacedTask, Progress, run_threads
from ckpt_tools.engine.files import FileReader
from ckpt_tools.engine.plan import Plan

try:
    from isal.isal_zlib import crc32  # eight times as fast, where it is installed
except ImportError:
    from zlib import crc32

BUFFER = 256 << 10
"""Bytes that a thread reads at once: they stay in a core's cache for the checksum."""


def checksums_of(plan: Plan, unread: Collection[str]) -> list[Checksum]:
    """What a copy compares, in the order of the files; nothing of a source that has digests of ours.

    Args:
        plan: of the copy.
        unread: leaves that share their blocks with the source, and whose bytes nobody reads.
    """
    source = plan.source
    if source.digests:
        return []
    checksums = sorted(source.store.checksums, key=attrgetter("file", "position"))
    if not checksums or not unread:
        return checksums
    read = {source.shared.get(copy.name, copy.name) for copy in plan.copies if copy.name not in unread}
    skipped = {source.shared.get(name, name) for name in unread} - read
    places = [(checksum.file, checksum.position) for checksum in checksums]
    wanted = [True] * len(checksums)
    # A checksum that lies over several tensors is wanted if one of them is.
    for is_read in (False, True):
        for name, tensor in source.store.tensors.items():
            native = source.side == "native"
            leaves = {piece.leaf for piece in source.layout.native[name].view.pieces} if native else {name}
            if (leaves <= skipped) is not is_read:
                for chunk in tensor.chunks:
                    wanted[bisect_right(places, (chunk.file, chunk.position)) - 1] = is_read
    return [checksum for checksum, is_wanted in zip(checksums, wanted, strict=True) if is_wanted]


class ChecksumPass:
    """Compares parts of files with the checksums that are recorded of them.

    Args:
        reader: of the files.
        checksums: what is recorded.
        progress: told of bytes as they are read.
    """

    def __init__(self, reader: FileReader, checksums: Sequence[Checksum], progress: Progress | None = None) -> None:
        self._reader = reader
        self._checksums = sorted(checksums, key=attrgetter("file", "position"))
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
        for at in range(0, checksum.nbytes, BUFFER):
            data = scratch("checksum", min(BUFFER, checksum.nbytes - at))
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
        progress.start("checking", sum(checksum.nbytes for checksum in checksums))
    with FileReader(checkpoint.root) as reader:
        checks = ChecksumPass(reader, checksums, progress)
        run_threads(checks.tasks(), lambda task: task[1](), threads)
        reader.check_unchanged()
    checks.finish(checkpoint.root)
    return [f"checksums: {len(checksums):,} pieces have the CRC-32 that torch saved with them"]
