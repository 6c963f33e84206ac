"""Carries a proven plan out: checks space, copies into a staging directory, and commits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from ckpt_tools.core.errors import InputChangedError, MismatchError
from ckpt_tools.core.paths import is_there
from ckpt_tools.core.storage import storage_errors
from ckpt_tools.core.tensors import TargetFiles
from ckpt_tools.engine import cloning
from ckpt_tools.engine.bounds import CopyOptions, check_room, shared_bytes, thread_bytes
from ckpt_tools.engine.checksums import RecordedPass, recorded_of
from ckpt_tools.engine.digest import ALGORITHM
from ckpt_tools.engine.execute import Copied, Executed, collect, execute, run_tasks, tasks_of
from ckpt_tools.engine.files import FileReader, FileWriter, identity_of
from ckpt_tools.engine.inputs import check_apart, check_unchanged
from ckpt_tools.engine.journal import FileJournal, boot_mark
from ckpt_tools.engine.manifest import MANIFEST, Manifest
from ckpt_tools.engine.plan import Plan, in_place
from ckpt_tools.engine.ranks import FirstRank, OtherRank
from ckpt_tools.engine.shares import agreement, share_of
from ckpt_tools.engine.staging import Staging
from ckpt_tools.engine.sums import sums_document
from ckpt_tools.engine.verify import check_duplicates, verify_changed
from ckpt_tools.families.family import LAYOUT_VERSION
from ckpt_tools.formats.hf import SUMS, SideFile
from ckpt_tools.formats.remote import remote_files
from ckpt_tools.version import TOOL


def run_plan(
    plan: Plan,
    destination: Path,
    manifest: Manifest,
    side_files: Mapping[str, SideFile | bytes],
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
    options = replace(options, threads=options.bounded_threads(thread_bytes(plan), shared_bytes(plan)))
    if isinstance(ranks, OtherRank):
        return _help(plan, destination, options, ranks)
    key = fingerprint(plan, destination)
    staging = Staging(destination, overwrite=options.overwrite)
    check_apart(plan.source, side_files, (staging.final, staging.path))
    with staging:
        copied = _found(plan, staging, key, options)
        if copied is None:
            copied = _make(plan, staging, key, manifest, side_files, options, ranks)
        else:
            staging.discard()
        if ranks is not None:
            ranks.conclude(copied)
    return copied


def _found(plan: Plan, staging: Staging, key: str, options: CopyOptions) -> Copied | None:
    """What the copy came to that an interrupted run had put in place already, None where it is to be made."""
    finished = staging.finished(key)
    if finished is None or is_there(staging.final / SUMS) is not options.sha256:
        return None
    read = {task.copy.name for task in tasks_of(plan.copies) if task.number in finished}
    placed = plan.sharing.leaves.keys() - read
    if plan.sharing.leaves and (options.digests or not placed):
        # Whether blocks are shared of leaves that were read nevertheless is not in the journal.
        return None
    if any(task.number not in finished for task in tasks_of(plan.copies, placed)):
        return None
    executed = collect(plan.copies, finished, placed=placed)
    files = {file for parts in plan.sharing.leaves.values() for file in parts}
    refused = files.difference(*(plan.sharing.leaves[name] for name in placed))
    return _copied(plan, executed, placed, frozenset(refused))


def _copied(plan: Plan, executed: Executed, placed: Collection[str], refused: frozenset[str]) -> Copied:
    known = known_digests(plan, placed).keys() | executed.digests.keys()
    return Copied(executed.rounded, plan.sharing.nbytes(refused), len(plan.copies) - len(known))


def _make(
    plan: Plan,
    staging: Staging,
    key: str,
    manifest: Manifest,
    side_files: Mapping[str, SideFile | bytes],
    options: CopyOptions,
    ranks: FirstRank | None,
) -> Copied:
    """Makes the output: everything aside, checked and synced, and then under its final name."""
    check = partial(check_room, plan, staging, side_files)
    check(plan.sharing.nbytes())
    journal = staging.resume(key, plan.target.store.files)
    changed = {copy.name for copy in plan.copies if copy.changes_values}
    try:
        check_duplicates(plan.source)
        verify_changed(plan.source, changed, threads=options.threads, progress=options.progress)
        executed, placed, refused = _place_tensors(plan, staging, journal, options, check, ranks)
        manifest.tensors = known_digests(plan, placed) | executed.digests
        write_side_files(staging, plan.target.documents, side_files, manifest)
        check_unchanged(plan.source)
        if options.sha256:
            files = (*plan.target.store.files, *plan.target.documents, *side_files, MANIFEST)
            sums = sums_document(staging.path, files, threads=options.threads, progress=options.progress)
            staging.write_document(SUMS, sums)
    except (MismatchError, InputChangedError) as error:
        if ranks is not None:
            ranks.fail(error)
        # What was read is not what should have been: nothing of it is gone on with.
        staging.discard()
        raise
    finally:
        journal.close()
    staging.commit()
    return _copied(plan, executed, placed, refused)


def _reader(plan: Plan, options: CopyOptions) -> FileReader:
    """Reader of the source; what is shared is read for its digest only."""
    reads_most = options.digests or plan.sharing.nbytes() < plan.nbytes_written // 2
    return FileReader(plan.source.root, plan.source.inputs, ahead=reads_most)


def known_digests(plan: Plan, placed: Collection[str]) -> dict[str, str]:
    """Digests that the source's manifest records of leaves that are taken over without being read."""
    recorded, names = plan.source.digests or {}, plan.source.shared
    found = {name: recorded.get(name) or recorded.get(names.get(name, "")) for name in placed}
    return {name: digest for name, digest in found.items() if digest}


def _help(plan: Plan, destination: Path, options: CopyOptions, ranks: OtherRank) -> Copied:
    """Copies this process's share into the files that the first one has made."""
    begun = ranks.begin(plan)
    if begun is None:
        return ranks.finish()
    staging = Staging(destination, overwrite=options.overwrite)
    staging.check_shared(begun.key)
    placed = () if options.digests else plan.sharing.placed(begun.refused)
    with _reader(plan, options) as reader, FileWriter(staging.path) as writer:
        checks = RecordedPass(reader, share_of(recorded_of(plan, placed), ranks.rank, ranks.world))
        journal = ranks.journal(writer, same_machine=begun.key.endswith(f" {boot_mark()}\n".encode()))
        run_tasks(begun.tasks, reader, writer, journal, options.threads, beside=checks.tasks())
        reader.check_unchanged()
        checks.finish(plan.source.root)
        check_unchanged(plan.source)
        with staging.syncing():
            journal.close()
    return ranks.finish()


def _place_tensors(
    plan: Plan,
    staging: Staging,
    journal: FileJournal,
    options: CopyOptions,
    check: Callable[[int], None],
    ranks: FirstRank | None,
) -> tuple[Executed, set[str], frozenset[str]]:
    """Fills and syncs every file that holds tensors.

    Returns:
        what was read; the leaves that share their blocks; files of the source that cannot.
    """
    with _reader(plan, options) as reader, FileWriter(staging.path) as writer:
        write_frames(plan.target, writer, plan.sharing.targets)
        # By this process alone, before the rest is divided.
        refused = cloning.share(plan.sharing, reader, writer, strict=options.strict)
        placed = plan.sharing.placed(refused)
        if refused:
            check(plan.sharing.nbytes(refused))
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
        unread = () if options.digests else placed
        checks = RecordedPass(reader, share_of(recorded_of(plan, unread), 0, 1 if ranks is None else ranks.world))
        executed = execute(
            in_place(plan.copies, placed),
            reader,
            writer,
            journal=journal,
            threads=options.threads,
            progress=options.progress,
            expected=plan.source.digests,
            beside=checks.tasks(),
            share=share,
            placed=unread,
        )
        reader.check_unchanged()
        checks.finish(plan.source.root)
        with staging.syncing():
            writer.sync()
            journal.sync()
    return executed, placed, refused


def write_frames(target: TargetFiles, writer: FileWriter, shared: Collection[str] = ()) -> None:
    """Makes every file at its final size and writes what is not tensor data.

    Args:
        target: the files.
        writer: of them.
        shared: files that are to share blocks; no space is taken for them.
    """
    for file, size in target.store.files.items():
        writer.create(file, size, allocate=file not in shared)
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
    source, remote = plan.source, remote_files(plan.source.root)
    place = str(source.root.resolve()) if remote is None else remote.url
    # The algorithm says how leaves are cut, so which segments the numbers of a journal mean.
    state = hashlib.sha256(repr((TOOL, ALGORITHM, place, os.path.abspath(destination))).encode())
    # Where a tensor's elements go follows from the layout, and that from the config: a plan that differs only there
    # has the same files.
    layout = source.layout
    state.update(repr((plan.side, source.side, layout.family, layout.form, LAYOUT_VERSION)).encode())
    state.update(json.dumps(source.config, sort_keys=True).encode())
    for file in source.store.files:
        if remote is not None:
            # Of its shell every run makes a new one.
            state.update(repr((file, remote.versions[file])).encode())
            continue
        path = source.root / file
        with storage_errors("look at", path):
            status = os.stat(path)
        # The time of the last change of any kind, too: it cannot be set back.
        identity = source.inputs.get(file) or identity_of(path)
        state.update(repr((file, identity, status.st_ctime_ns)).encode())
    for tensor in plan.target.store.tensors.values():
        state.update(repr((tensor.name, tensor.dtype.name, tensor.shape, tensor.chunks)).encode())
    return state.hexdigest()
