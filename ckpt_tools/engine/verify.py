"""Checks of a checkpoint: structure from headers, digests, and equality with another checkpoint bit for bit.

Both comparisons stream: two windows are in memory for each thread, never a tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import xxhash

from ckpt_tools.core.errors import FormatError, LayoutError, MismatchError, NotFoundError, listed
from ckpt_tools.core.scratch import scratch
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.checksums import blobs_of, compare_recorded
from ckpt_tools.engine.digest import ALGORITHM, combine
from ckpt_tools.engine.ends import Digest, decoded_as, plain, plains
from ckpt_tools.engine.execute import WINDOW, Progress, Task, room_for, run_threads, tasks_of, window_items, windows
from ckpt_tools.engine.extents import items_of, leaf_extents
from ckpt_tools.engine.files import FileReader
from ckpt_tools.engine.plan import LeafCopy
from ckpt_tools.engine.transfer import Window, equal
from ckpt_tools.formats.hf import SideFile


@dataclass
class Checks:
    """What was checked, in words for a report, and how much."""

    tensors: int = 0
    elements: int = 0
    nbytes: int = 0
    done: list[str] = field(default_factory=list)


def verify_structure(checkpoint: Checkpoint) -> Checks:
    """Every leaf is there exactly once, with the shape that the config says.

    Raises:
        LayoutError: one is not.
    """
    ends = checkpoint.ends()
    sizes = [checkpoint.layout.leaves[name].numel for name in ends]
    checks = Checks(len(ends), sum(sizes), checkpoint.store.nbytes)
    checks.done.append(f"structure: {len(ends):,} tensors, each element there exactly once")
    return checks


def verify_digests(checkpoint: Checkpoint, *, threads: int | None, progress: Progress | None) -> list[str]:
    """Compares every digest that the manifest records; returns what was compared, in words.

    Raises:
        MismatchError: a tensor, a blob or a side file does not have its digest.
        FormatError: the manifest records digests by an algorithm that this version does not know.
    """
    manifest = checkpoint.manifest
    if manifest is None:
        if checkpoint.store.checksums:
            return []
        return ["digests: none recorded (no ckpt-manifest.json); values were not checked"]
    if manifest.foreign_digests:
        raise FormatError(
            f"{checkpoint.root}: values cannot be checked: {manifest.foreign_digests}",
            hint="--no-digests checks the rest, with --against also the values; or use the version that wrote it",
        )
    done = []
    if manifest.tensors is not None and checkpoint.digests is None:
        held, recorded = checkpoint.layout.leaf_form or "plain", manifest.form or "plain"
        raise MismatchError(f"{checkpoint.root}: the manifest is of the {recorded} form, the tensors are {held}")
    if checkpoint.digests is not None:
        found = leaf_digests(checkpoint, checkpoint.digests, threads=threads, progress=progress)
        _compare(found, checkpoint.digests, "tensors", checkpoint.root)
        done.append(f"digests: {len(found):,} tensors have the values that were written ({ALGORITHM})")
        if unknown := len(checkpoint.layout.leaves.keys() - found.keys() - checkpoint.shared.keys()):
            done.append(f"digests: none recorded for {unknown:,} tensors, which shared their blocks with the source")
    if manifest.blobs:
        blobs = blobs_of(manifest)
        compare_recorded(checkpoint, blobs, threads=threads, progress=progress)
        done.append(f"digests: {len(blobs):,} blobs have the bytes that training saved")
    if manifest.tensors is None and not manifest.blobs:
        done.append("digests: the manifest records none for tensors; values were not checked")
    if manifest.side_files:
        files = {name: _file_digest(checkpoint.root, name) for name in manifest.side_files}
        _compare(files, manifest.side_files, "side files", checkpoint.root)
        done.append(f"digests: {len(files):,} side files are as they were written")
    return done


def _compare(found: Mapping[str, str], recorded: Mapping[str, str], what: str, root: Path) -> None:
    wrong = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
    if wrong:
        raise MismatchError(
            f"{root}: {len(wrong):,} {what} do not have the digest that was recorded\n{listed(wrong)}",
            hint="the files were changed or damaged after they were written; make or fetch them again",
        )


def verify_changed(
    source: Checkpoint, changed: Collection[str], *, threads: int | None, progress: Progress | None
) -> None:
    """Compares the recorded digests of leaves that a copy changes, and whose stored bytes it therefore does not hash.

    Args:
        source: the checkpoint that is copied.
        changed: leaves that are cast, dequantised or quantised.
        threads: worker threads.
        progress: told of bytes as they are read.

    Raises:
        MismatchError: a leaf does not have its digest.
    """
    recorded = {name: digest for name, digest in (source.digests or {}).items() if name in changed}
    if recorded:
        found = leaf_digests(source, recorded, threads=threads, progress=progress)
        _compare(found, recorded, "tensors", source.root)


def leaf_digests(
    checkpoint: Checkpoint, names: Collection[str], *, threads: int | None, progress: Progress | None
) -> dict[str, str]:
    """The digests of those of the named leaves that there are, read through the layout."""
    copies = [copy for copy in _reads(checkpoint) if copy.name in names]
    found: dict[tuple[str, int], bytes] = {}

    with FileReader(checkpoint.root, checkpoint.inputs) as reader:

        def act(task: Task) -> None:
            digest, end = Digest(), task.copy.source
            step = max(1, WINDOW // end.itemsize // end.write_step) * end.write_step
            if end.is_transposed:
                step = window_items(task.copy)
            with room_for(task.copy):
                for low in range(task.low, task.high, step):
                    for part, data in end.stored(low, min(low + step, task.high), reader):
                        digest.update(part, data)
                        if progress is not None:
                            progress.advance(len(data))
            found[task.copy.name, task.low] = digest.digest()

        if progress is not None:
            parts = ((end.itemsize, part) for copy in copies for end in plains(copy.source) for part in end.extents)
            progress.start("hashing", sum(itemsize * part.numel for itemsize, part in parts))
        run_threads(tasks_of(copies), act, threads)
        reader.check_unchanged()
    return {c.name: combine([found[c.name, low] for low, _ in c.segments()]) for c in copies}


def compare(
    checkpoint: Checkpoint, other: Checkpoint, *, threads: int | None = None, progress: Progress | None = None
) -> int:
    """Compares two checkpoints bit for bit, each read through its own side of the layout.

    Returns:
        the number of leaves compared.

    Raises:
        LayoutError: names or dtypes differ.
        MismatchError: values differ; the tensors are listed with the first element that does.
    """
    if checkpoint.layout.tied.keys() != other.layout.tied.keys():
        checkpoint, other = checkpoint.untied(), other.untied()
    copies, theirs = _pairs(checkpoint, other)
    different: dict[str, list[tuple[int, int]]] = {}
    lock = threading.Lock()
    with FileReader(checkpoint.root, checkpoint.inputs) as reader, FileReader(other.root, other.inputs) as other_reader:

        def act(task: Task) -> None:
            found = _difference(task, theirs[task.copy.name], reader, other_reader, progress)
            if found is not None:
                with lock:
                    different.setdefault(task.copy.name, []).append(found)

        if progress is not None:
            progress.start("comparing", checkpoint.store.nbytes)
        run_threads(tasks_of(copies), act, threads)
        reader.check_unchanged()
        other_reader.check_unchanged()
    if different:
        items = {copy.name: copy.items for copy in copies}
        lines = [
            f"{name}: {sum(count for _, count in found):,} of {items[name]:,} elements, the first is {min(found)[0]:,}"
            for name, found in sorted(different.items())
        ]
        raise MismatchError(
            f"{len(different):,} of {len(copies):,} tensors of {checkpoint.root} differ from {other.root}\n"
            + listed(lines)
        )
    return len(copies)


def _pairs(checkpoint: Checkpoint, other: Checkpoint) -> tuple[list[LeafCopy], dict[str, LeafCopy]]:
    """The leaves of both to be read; a quantised leaf is decoded to the dtype that the other side holds."""
    mine, theirs = _reads(checkpoint), {copy.name: copy for copy in _reads(other)}
    names = {copy.name for copy in mine}
    faults = [f"only in {checkpoint.root}: {name}" for name in sorted(names - theirs.keys())]
    faults += [f"only in {other.root}: {name}" for name in sorted(theirs.keys() - names)]
    for number, copy in enumerate(mine):
        name, twin = copy.name, theirs.get(copy.name)
        if twin is None:
            continue
        end, their_end = (decoded_as(a.source, b.source.dtype) for a, b in ((copy, twin), (twin, copy)))
        mine[number], theirs[name] = replace(copy, source=end), replace(twin, source=their_end)
        if end.dtype is not their_end.dtype:
            faults.append(f"{name} is {end.dtype} in {checkpoint.root} and {their_end.dtype} in {other.root}")
        elif checkpoint.layout.leaves[name].shape != other.layout.leaves[name].shape:
            faults.append(f"{name} has different shapes")
    if faults:
        raise LayoutError(f"the checkpoints do not hold the same tensors:\n{listed(faults)}")
    return mine, theirs


def _difference(
    task: Task, twin: LeafCopy, reader: FileReader, other_reader: FileReader, progress: Progress | None = None
) -> tuple[int, int] | None:
    """(first item, number of items) of the segment that differ in the twin, or None."""
    first, count = -1, 0
    for window in windows(task, reader):
        theirs = scratch("twin", len(window.data))
        twin.source.fill(Window(theirs, window.low, window.high, window.itemsize), other_reader)
        if not equal(window.data, theirs):
            if first < 0:
                first = window.low + _first_difference(window.data, theirs) // window.itemsize
            count += _differing(window.data, theirs, window.itemsize)
        if progress is not None:
            progress.advance(len(theirs))
    return None if first < 0 else (first, count)


def _differing(values: memoryview, others: memoryview, itemsize: int) -> int:
    import numpy as np

    item = f"u{itemsize}"
    return int(np.count_nonzero(np.frombuffer(values, item) != np.frombuffer(others, item)))


def _first_difference(a: memoryview, b: memoryview) -> int:
    low, high = 0, len(a)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if a[low:middle] != b[low:middle] else (middle, high)
    return low


def _reads(checkpoint: Checkpoint) -> list[LeafCopy]:
    """The leaves of a checkpoint to be read, in the order of its files."""
    leaves = checkpoint.layout.leaves
    copies = [LeafCopy(name, items_of(end.dtype, leaves[name].shape), end) for name, end in checkpoint.ends().items()]
    copies.sort(key=lambda c: c.source.first())
    return copies


def _file_digest(root: Path, name: str) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(SideFile(root, name).read())
    except NotFoundError:
        return "absent"


def check_duplicates(checkpoint: Checkpoint) -> None:
    """Tied names that the files hold all the same must have the values of the tensor that they are tied to.

    transformers 4 and SGLang tie such a checkpoint and transformers 5 and vLLM read the file, so one that differs means
    two models in one; it is refused rather than resolved.

    Raises:
        MismatchError: the values differ.
    """
    for name, tensor in checkpoint.duplicates.items():
        twin = checkpoint.store.tensors[checkpoint.layout.native_tied[name]]
        pair = [LeafCopy(t.name, items_of(t.dtype, t.shape), plain(t, leaf_extents(t))) for t in (tensor, twin)]
        with FileReader(checkpoint.root, checkpoint.inputs) as reader:
            differ = any(_difference(task, pair[1], reader, reader) is not None for task in tasks_of(pair[:1]))
        if differ:
            raise MismatchError(
                f"{checkpoint.root}: config.json ties {name} to {twin.name}, but the files hold different values",
                hint="set tie_word_embeddings to false in config.json to keep both, or remove one",
            )
