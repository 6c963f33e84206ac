"""Carries a proven plan out: checks space, copies into a staging directory, and commits."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ckpt_tools.core.errors import MismatchError, ResourceError
from ckpt_tools.core.tensors import TargetFiles
from ckpt_tools.engine import cloning
from ckpt_tools.engine.digest import SEGMENT
from ckpt_tools.engine.ends import Encoded
from ckpt_tools.engine.execute import WINDOW, Copied, Progress, default_threads, execute, run_tasks, window_items
from ckpt_tools.engine.files import FileReader, FileWriter, storage_errors
from ckpt_tools.engine.manifest import MANIFEST, Manifest
from ckpt_tools.engine.plan import Plan, in_place
from ckpt_tools.engine.ranges import ROOM
from ckpt_tools.engine.ranks import FirstRank, OtherRank
from ckpt_tools.engine.shares import agreement
from ckpt_tools.engine.staging import Staging, boot_mark
from ckpt_tools.engine.sums import sums_document
from ckpt_tools.engine.verify import check_duplicates
from ckpt_tools.formats.hf import SUMS
from ckpt_tools.formats.remote import remote_files
from ckpt_tools.layouts.codecs import SCRATCH

PER_THREAD = 4 * WINDOW
"""Upper bound of the bytes that a thread holds for plain leaves: window, cast copy and scratch of a strided run."""

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
        strict: blocks that the plan shares and that cannot be shared are an error.
        digests: leaves that share their blocks with the source are read, too.
        sha256: write `SHA256SUMS` beside the files.
    """

    overwrite: bool = False
    threads: int | None = None
    memory: int | None = None
    progress: Progress | None = None
    strict: bool = False
    digests: bool = False
    sha256: bool = False

    def bounded_threads(self, per_thread: int = PER_THREAD, shared: int = 0) -> int:
        """Threads that fit into the memory bound, each holding up to `per_thread` bytes, and all together `shared`.

        Raises:
            ResourceError: not even one does.
        """
        wanted = self.threads or default_threads()
        if self.memory is None:
            return wanted
        fitting, least = (self.memory - shared) // per_thread, per_thread + shared
        if fitting < 1:
            raise ResourceError(
                f"a memory bound of {self.memory:,} bytes is below the {least:,} that one thread needs",
                hint=f"give --memory {-(-least // (1 << 20))}MiB or more",
            )
        return min(wanted, fitting)


def thread_bytes(plan: Plan) -> int:
    """Upper bound of the bytes that one thread of the plan holds: whole blocks of a quantised leaf can be large, and
    transposed leaves are held by segments, as they come and as they go."""
    # What is shared is neither transposed nor encoded.
    moved = [copy for copy in plan.copies if copy.name not in plan.sharing.leaves]
    ends = (end for copy in moved for end in (copy.source, copy.target) if end is not None)
    plain = PER_THREAD + 3 * SEGMENT if any(end.is_transposed for end in ends) else PER_THREAD
    encoded = (window_items(c) for c in moved if isinstance(c.source, Encoded) or isinstance(c.target, Encoded))
    items = max(encoded, default=0)
    return max(plain, PER_ENCODED_ITEM * items + SCRATCH) if items else plain


def shared_bytes(plan: Plan) -> int:
    """Upper bound of the bytes that all threads of the plan hold together: blocks of a remote source."""
    return 0 if remote_files(plan.source.root) is None else ROOM


def check_disk(destination: Path, needed: int) -> None:
    """Raises `ResourceError` when the file system of `destination` has less than `needed` bytes free."""
    folder = destination.absolute()
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
    side_files: Mapping[str, Path | bytes],
    options: CopyOptions,
    ranks: FirstRank | OtherRank | None = None,
) -> Copied:
    """Puts everything into place: shares what can be shared and copies the rest.

    Args:
        plan: the proven plan.
        destination: directory to make.
        manifest: what to record; its digests are filled in.
        side_files: files that are not tensors, by relative path: a file to copy byte for byte, or the bytes.
        options: how to run.
        ranks: the processes that share the work, all of which call this; None for this one alone.

    Raises:
        CkptError: whatever went wrong; the destination is then absent or as it was before.
    """
    if isinstance(ranks, OtherRank):
        return _help(plan, destination, options, ranks)
    check_duplicates(plan.source)
    threads = options.bounded_threads(thread_bytes(plan), shared_bytes(plan))
    with Staging(destination, overwrite=options.overwrite) as staging:
        journal = staging.resume(fingerprint(plan, destination))
        check_disk(destination, _room(plan, plan.sharing.nbytes(), staging.path))
        with _reader(plan, options) as reader, FileWriter(staging.path) as writer:
            write_frames(plan.target, writer)
            # By this process alone, before the rest is divided.
            refused = cloning.share(plan.sharing, reader, writer, strict=options.strict)
            placed, shared = plan.sharing.placed(refused), plan.sharing.nbytes(refused)
            if refused:
                check_disk(destination, _room(plan, shared, staging.path))
            share = None
            if ranks is not None:
                share = partial(
                    ranks.sharing,
                    mark=agreement(plan),
                    key=journal.key,
                    refused=refused,
                    journal=journal,
                    progress=options.progress,
                )
            try:
                executed = execute(
                    in_place(plan.copies, placed) if options.digests else plan.copies,
                    reader,
                    writer,
                    journal=journal,
                    threads=threads,
                    progress=options.progress,
                    expected=plan.source.digests,
                    share=share,
                    placed=() if options.digests else placed,
                )
                reader.check_unchanged()
            except MismatchError:
                journal.close()
                staging.discard()
                raise
            writer.sync()
        journal.close()
        manifest.tensors = known_digests(plan, placed) | executed.digests
        write_side_files(staging, plan.target.documents, side_files, manifest)
        if options.sha256:
            files = (*plan.target.store.files, *plan.target.documents, *side_files, MANIFEST)
            sums = sums_document(staging.path, files, threads=threads, progress=options.progress)
            staging.write_document(SUMS, sums)
        staging.commit()
        copied = Copied(executed.rounded, shared, len(plan.copies) - len(manifest.tensors))
        if ranks is not None:
            ranks.conclude(copied)
    return copied


def _reader(plan: Plan, options: CopyOptions) -> FileReader:
    """Reader of the source; what is shared is read for its digest only."""
    reads_most = options.digests or plan.sharing.nbytes() < plan.nbytes_written // 2
    return FileReader(plan.source.root, ahead=reads_most)


def _room(plan: Plan, shared: int, staging: Path) -> int:
    """Bytes that the disk has to have free for what is not shared and not there yet."""
    used = sum(os.stat(p).st_blocks * 512 for p in staging.rglob("*") if p.is_file())
    # Blocks that an interrupted run shared count as used, although they took no room.
    return max(0, plan.nbytes_written - shared + SLACK - max(0, used - shared))


def known_digests(plan: Plan, placed: Collection[str]) -> dict[str, str]:
    """Digests that the source's manifest records of leaves that are taken over without being read."""
    recorded, names = plan.source.digests or {}, plan.source.shared
    found = {name: recorded.get(name) or recorded.get(names.get(name, "")) for name in placed}
    return {name: digest for name, digest in found.items() if digest}


def _help(plan: Plan, destination: Path, options: CopyOptions, ranks: OtherRank) -> Copied:
    """Copies this process's share into the files that the first one has made."""
    threads = options.bounded_threads(thread_bytes(plan), shared_bytes(plan))
    begun = ranks.begin(plan)
    if begun is None:
        return ranks.finish()
    key, tasks = begun
    staging = Staging(destination, overwrite=options.overwrite)
    staging.check_shared(key)
    with _reader(plan, options) as reader, FileWriter(staging.path) as writer:
        journal = ranks.journal(writer, same_machine=key.endswith(boot_mark()))
        run_tasks(tasks, reader, writer, journal, threads)
        reader.check_unchanged()
        journal.close()
    return ranks.finish()


def write_frames(target: TargetFiles, writer: FileWriter) -> None:
    """Makes every file at its final size and writes what is not tensor data."""
    for file, size in target.store.files.items():
        writer.create(file, size)
    for frame in target.framing:
        writer.write(frame.file, frame.position, memoryview(frame.data))


def write_side_files(
    staging: Staging, documents: Mapping[str, bytes], side_files: Mapping[str, Path | bytes], manifest: Manifest
) -> None:
    """Writes the small files, the manifest last."""
    import xxhash

    for name, content in {**documents, **side_files}.items():
        if isinstance(content, Path):
            with storage_errors("read", content):
                data = content.read_bytes()
        else:
            data = content
        if name in side_files:
            manifest.side_files[name] = xxhash.xxh3_128_hexdigest(data)
        staging.write_document(name, data)
    staging.write_document(MANIFEST, manifest.to_json())


def fingerprint(plan: Plan, destination: Path) -> str:
    """Identifies a plan, its inputs and its output, so that only the same work is resumed."""
    root, remote = plan.source.root, remote_files(plan.source.root)
    place = str(root.resolve()) if remote is None else remote.url
    state = hashlib.sha256(repr((place, os.path.abspath(destination), plan.side)).encode())
    for file in plan.source.store.files:
        if remote is not None:
            state.update(repr((file, remote.versions[file])).encode())
            continue
        with storage_errors("look at", plan.source.root / file):
            status = os.stat(plan.source.root / file)
        state.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
    for tensor in plan.target.store.tensors.values():
        state.update(repr((tensor.name, tensor.dtype.name, tensor.shape, tensor.chunks)).encode())
    return state.hexdigest()
