"""Carries a proven plan out: checks space, copies into a staging directory, and commits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt_tools.core.errors import InputChangedError, MismatchError, ResourceError
from ckpt_tools.core.tensors import TargetFiles
from ckpt_tools.engine.checksums import RecordedPass, recorded_of
from ckpt_tools.engine.digest import ALGORITHM
from ckpt_tools.engine.ends import Encoded
from ckpt_tools.engine.execute import (
    WINDOW,
    Executed,
    Progress,
    collect,
    default_threads,
    execute,
    tasks_of,
    window_items,
)
from ckpt_tools.engine.files import FileReader, FileWriter, identity_of, storage_errors
from ckpt_tools.engine.inputs import check_apart, check_unchanged
from ckpt_tools.engine.journal import FileJournal
from ckpt_tools.engine.manifest import MANIFEST, Manifest
from ckpt_tools.engine.plan import Plan
from ckpt_tools.engine.staging import Staging
from ckpt_tools.engine.verify import verify_changed
from ckpt_tools.families.family import LAYOUT_VERSION
from ckpt_tools.formats.hf import SideFile
from ckpt_tools.layouts.codecs import SCRATCH
from ckpt_tools.version import TOOL

PER_THREAD = 4 * WINDOW
"""Upper bound of the bytes that a thread holds for plain leaves: window, cast copy and scratch of a strided piece."""

PER_ENCODED_ITEM = 16
"""Upper bound of the bytes that a thread holds for each item of a window that is quantised: values, codes, and the
values that they read back as."""

SLACK = 16 << 20
"""Disk left free beyond the plan, for the journal and the file system's own records."""


@dataclass(frozen=True)
class CopyOptions:
    """How a copy is run.

    Attributes:
        overwrite: an existing output may be replaced; it stays until the new one is whole.
        threads: worker threads, None for the default.
        memory: upper bound of buffers in bytes, None for no bound.
        progress: told of bytes as they are written.
    """

    overwrite: bool = False
    threads: int | None = None
    memory: int | None = None
    progress: Progress | None = None

    def bounded_threads(self, per_thread: int = PER_THREAD) -> int:
        """Threads that fit into the memory bound, each holding up to `per_thread` bytes.

        Raises:
            ResourceError: not even one does.
        """
        wanted = self.threads or default_threads()
        if self.memory is None:
            return wanted
        fitting = self.memory // per_thread
        if fitting < 1:
            raise ResourceError(
                f"a memory bound of {self.memory:,} bytes is below the {per_thread:,} that one thread needs",
                hint=f"give --memory {-(-per_thread // (1 << 20))}MiB or more",
            )
        return min(wanted, fitting)


def thread_bytes(plan: Plan) -> int:
    """Upper bound of the bytes that one thread of the plan holds: whole blocks of a quantised leaf can be large, and
    so can windows of transposed ones."""
    window = max((window_items(copy) * copy.source.itemsize for copy in plan.copies), default=0)
    plain = PER_THREAD + max(0, window - WINDOW)
    encoded = (window_items(c) for c in plan.copies if isinstance(c.source, Encoded) or isinstance(c.target, Encoded))
    items = max(encoded, default=0)
    return max(plain, PER_ENCODED_ITEM * items + SCRATCH) if items else plain


def check_disk(destination: Path, needed: int) -> None:
    """Raises `ResourceError` when the file system of `destination` has less than `needed` bytes free."""
    folder = destination.absolute()
    with storage_errors("look at", folder):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"{destination} needs {needed / 1e9:,.2f} GB and {folder} has {free / 1e9:,.2f} GB free",
            hint="free space or choose another disk; nothing was written",
        )


def run_plan(
    plan: Plan,
    destination: Path,
    manifest: Manifest,
    side_files: Mapping[str, SideFile | bytes],
    options: CopyOptions,
) -> frozenset[str]:
    """Copies everything into place.

    Args:
        plan: the proven plan.
        destination: directory to make.
        manifest: what to record; its digests are filled in.
        side_files: files that are not tensors, by relative path: a file to copy byte for byte, or the bytes.
        options: how to run.

    Returns:
        names of the leaves that have values that quantising changed.

    Raises:
        CkptError: whatever went wrong; the destination is then absent or as it was before.
    """
    threads = options.bounded_threads(thread_bytes(plan))
    key = fingerprint(plan, destination)
    staging = Staging(destination, overwrite=options.overwrite)
    check_apart(plan.source, side_files, (staging.final, staging.path))
    with staging:
        finished = staging.finished(key)
        if finished is not None and all(task.number in finished for task in tasks_of(plan.copies)):
            staging.discard()
            return collect(plan.copies, finished).rounded
        _check_room(plan, staging, side_files)
        journal = staging.resume(key, plan.target.store.files)
        changed = {copy.name for copy in plan.copies if copy.changes_values}
        try:
            verify_changed(plan.source, changed, threads=threads, progress=options.progress)
            executed = _copy_tensors(plan, staging, journal, threads, options.progress)
            manifest.tensors = executed.digests
            write_side_files(staging, plan.target.documents, side_files, manifest)
            check_unchanged(plan.source)
        except (MismatchError, InputChangedError):
            # What was read is not what should have been: nothing of it is gone on with.
            staging.discard()
            raise
        finally:
            journal.close()
        staging.commit()
    return executed.rounded


def _copy_tensors(
    plan: Plan, staging: Staging, journal: FileJournal, threads: int, progress: Progress | None
) -> Executed:
    """Fills and syncs every file that holds tensors."""
    with FileReader(plan.source.root, plan.source.inputs) as reader, FileWriter(staging.path) as writer:
        write_frames(plan.target, writer)
        checks = RecordedPass(reader, recorded_of(plan.source))
        executed = execute(
            plan.copies,
            reader,
            writer,
            journal=journal,
            threads=threads,
            progress=progress,
            expected=plan.source.digests,
            beside=checks.tasks(),
        )
        reader.check_unchanged()
        checks.finish(plan.source.root)
        with staging.syncing():
            writer.sync()
            journal.sync()
    return executed


def _check_room(plan: Plan, staging: Staging, side_files: Mapping[str, SideFile | bytes]) -> None:
    """Raises `ResourceError` when the disk has no room for what is not there yet."""
    beside = sum(map(len, plan.target.documents.values()))
    for content in side_files.values():
        if isinstance(content, SideFile):
            with storage_errors("look at", content.root / content.name):
                beside += os.stat(content.root / content.name).st_size
        else:
            beside += len(content)
    try:
        check_disk(staging.final, max(0, plan.nbytes_written + beside + SLACK - _bytes_used(staging.path)))
    except ResourceError:
        # An empty directory is of no use to a rerun.
        with contextlib.suppress(OSError):
            staging.path.rmdir()
        raise


def write_frames(target: TargetFiles, writer: FileWriter) -> None:
    """Makes every file at its final size and writes what is not tensor data."""
    for file, size in target.store.files.items():
        writer.create(file, size)
    for frame in target.framing:
        writer.write(frame.file, frame.position, memoryview(frame.data))


def write_side_files(
    staging: Staging, documents: Mapping[str, bytes], side_files: Mapping[str, SideFile | bytes], manifest: Manifest
) -> None:
    """Writes the small files, the manifest last."""
    import xxhash

    for name, content in {**documents, **side_files}.items():
        if isinstance(content, SideFile):
            manifest.side_files[name] = staging.copy_document(name, content)
            continue
        if name in side_files:
            manifest.side_files[name] = xxhash.xxh3_128_hexdigest(content)
        staging.write_document(name, content)
    staging.write_document(MANIFEST, manifest.to_json())


def fingerprint(plan: Plan, destination: Path) -> str:
    """Identifies a plan, its inputs and its output, so that only the same work is resumed."""
    source = plan.source
    # The algorithm says how leaves are cut, so which segments the numbers of a journal mean.
    state = hashlib.sha256(repr((TOOL, ALGORITHM, str(source.root.resolve()), os.path.abspath(destination))).encode())
    # Where a tensor's elements go follows from the layout, and that from the config: a plan that differs only there
    # has the same files.
    layout = source.layout
    state.update(repr((plan.side, source.side, layout.family, layout.form, LAYOUT_VERSION)).encode())
    state.update(json.dumps(source.config, sort_keys=True).encode())
    for file in source.store.files:
        path = source.root / file
        with storage_errors("look at", path):
            status = os.stat(path)
        # The time of the last change of any kind, too: it cannot be set back.
        identity = source.inputs.get(file) or identity_of(path)
        state.update(repr((file, identity, status.st_ctime_ns)).encode())
    for tensor in plan.target.store.tensors.values():
        state.update(repr((tensor.name, tensor.dtype.name, tensor.shape, tensor.chunks)).encode())
    return state.hexdigest()


def _bytes_used(folder: Path) -> int:
    with storage_errors("look at", folder):
        return sum(os.stat(p).st_blocks * 512 for p in folder.rglob("*") if p.is_file())
