"""Records of what the bytes of a file's parts were: the CRC-32 that `torch.save` leaves of every tensor in a DCP file,
and the digests that a training save of ours has of its blobs.

`verify` compares them, and so does a copy while it runs, when it comes to the place: from the disk they are read once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import xxhash

from ckpt_tools.core.errors import MismatchError, listed
from ckpt_tools.core.scratch import scratch
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.execute import PlacedTask, Progress, run_threads
from ckpt_tools.engine.files import FileReader
from ckpt_tools.engine.manifest import Manifest
from ckpt_tools.engine.plan import Plan

try:
    from isal.isal_zlib import crc32  # eight times as fast, where it is installed
except ImportError:
    from zlib import crc32

BUFFER = 256 << 10
"""Bytes that a thread reads at once: they stay in a core's cache for the arithmetic."""


class Recorded(NamedTuple):
    """A part of a file, and what is recorded of its bytes.

    Attributes:
        tensor: whose bytes these are, empty where that is not known.
        file, position, nbytes: where they lie.
        value: their CRC-32, or their xxh3-128 as hexadecimal text.
    """

    tensor: str
    file: str
    position: int
    nbytes: int
    value: int | str


def recorded_of(plan: Plan, unread: Collection[str]) -> list[Recorded]:
    """What a copy can compare beside the digests of its leaves, in the order of the files.

    These are the blobs that hold its tensors, where training saved it; or, without digests of ours, torch's checksums.

    Args:
        plan: of the copy.
        unread: leaves that share their blocks with the source, and whose bytes nobody reads.
    """
    source = plan.source
    if source.manifest is not None and source.manifest.blobs:
        chunks = (chunk for tensor in source.store.tensors.values() for chunk in tensor.chunks)
        places = {(chunk.file, chunk.position) for chunk in chunks}
        recorded = [blob for blob in blobs_of(source.manifest) if _place(blob) in places]
    else:
        recorded = [] if source.digests else [Recorded(*checksum) for checksum in source.store.checksums]
    recorded.sort(key=_place)
    return _read_ones(recorded, plan, unread) if recorded and unread else recorded


def _read_ones(recorded: Sequence[Recorded], plan: Plan, unread: Collection[str]) -> list[Recorded]:
    """Those of the parts that hold something of a leaf that is read; each tensor lies in one of them."""
    source = plan.source
    read = {source.shared.get(copy.name, copy.name) for copy in plan.copies if copy.name not in unread}
    skipped = {source.shared.get(name, name) for name in unread} - read
    places = [_place(part) for part in recorded]
    wanted = [True] * len(recorded)
    # A part that lies over several tensors is wanted if one of them is.
    for is_read in (False, True):
        for name, tensor in source.store.tensors.items():
            leaves = source.layout.native[name].leaves if source.side == "native" else (name,)
            if skipped.issuperset(leaves) is not is_read:
                for chunk in tensor.chunks:
                    wanted[bisect_right(places, (chunk.file, chunk.position)) - 1] = is_read
    return [part for part, is_wanted in zip(recorded, wanted, strict=True) if is_wanted]


def blobs_of(manifest: Manifest) -> list[Recorded]:
    """The blobs whose digests a manifest records."""
    return [Recorded("", file, *entry) for file, entries in manifest.blobs.items() for entry in entries]


def _place(part: Recorded) -> tuple[str, int]:
    return part.file, part.position


class RecordedPass:
    """Compares parts of files with what is recorded of them.

    Args:
        reader: of the files.
        recorded: what to compare.
        progress: told of bytes as they are read.
    """

    def __init__(self, reader: FileReader, recorded: Sequence[Recorded], progress: Progress | None = None) -> None:
        self._reader = reader
        self._recorded = sorted(recorded, key=_place)
        self._progress = progress
        self._wrong: list[str] = []

    def tasks(self) -> Iterator[PlacedTask]:
        """The comparisons in the order of the files, to be done by any threads."""
        for part in self._recorded:
            yield _place(part), partial(self._compare, part)

    def finish(self, root: Path) -> None:
        """Raises `MismatchError` if a comparison failed."""
        if self._wrong:
            raise MismatchError(
                f"{root}: {len(self._wrong):,} pieces do not have the CRC-32 or digest that was saved with them\n"
                + listed(sorted(self._wrong)),
                hint="the files were damaged after training saved them; copy them again, or use another checkpoint",
            )

    def _compare(self, part: Recorded) -> None:
        checksum, digest = 0, xxhash.xxh3_128()
        for at in range(0, part.nbytes, BUFFER):
            data = scratch("recorded", min(BUFFER, part.nbytes - at))
            self._reader.read(part.file, part.position + at, data)
            if isinstance(part.value, int):
                checksum = crc32(data, checksum)
            else:
                digest.update(data)
            if self._progress is not None:
                self._progress.advance(len(data))
        if part.value != (checksum if isinstance(part.value, int) else digest.hexdigest()):
            self._wrong.append(f"{part.tensor or 'a blob'}, in {part.file} at byte {part.position:,}")


def compare_recorded(
    checkpoint: Checkpoint, recorded: Sequence[Recorded], *, threads: int | None, progress: Progress | None
) -> None:
    """Compares parts of a checkpoint's files with what is recorded of them.

    Raises:
        MismatchError: the bytes of one are others.
    """
    if progress is not None:
        progress.start("checking", sum(part.nbytes for part in recorded))
    with FileReader(checkpoint.root, checkpoint.inputs) as reader:
        checks = RecordedPass(reader, recorded, progress)
        run_threads(checks.tasks(), lambda task: task[1](), threads)
        reader.check_unchanged()
    checks.finish(checkpoint.root)


def verify_checksums(checkpoint: Checkpoint, *, threads: int | None, progress: Progress | None) -> list[str]:
    """Compares every checksum that the files record; returns what was compared, in words.

    Raises:
        MismatchError: a tensor's bytes do not have their checksum.
    """
    checksums = [Recorded(*checksum) for checksum in checkpoint.store.checksums]
    if not checksums:
        return []
    compare_recorded(checkpoint, checksums, threads=threads, progress=progress)
    return [f"checksums: {len(checksums):,} pieces have the CRC-32 that torch saved with them"]
