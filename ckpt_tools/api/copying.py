"""`convert` and `consolidate`, which make a checkpoint out of another, and `plan`, which says what they would do."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from ckpt_tools.api.opening import opened
from ckpt_tools.api.planning import one_of, plan_consolidation, plan_conversion
from ckpt_tools.api.reports import CopyReport
from ckpt_tools.core.sizes import parse_size
from ckpt_tools.engine.bounds import CopyOptions, shared_bytes, thread_bytes
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.cloning import Reflink
from ckpt_tools.engine.copy import known_digests, run_plan
from ckpt_tools.engine.execute import Copied, Progress
from ckpt_tools.engine.manifest import Manifest
from ckpt_tools.engine.plan import Plan
from ckpt_tools.engine.ranks import Ranks
from ckpt_tools.engine.sides import native_side_files, repository_side_files
from ckpt_tools.engine.targets import NativeFormat
from ckpt_tools.families.family import LAYOUT_VERSION
from ckpt_tools.formats.hub import ResolvedSource, resolve_source
from ckpt_tools.formats.remote import by_url, place, remote_files
from ckpt_tools.version import TOOL


@by_url
def convert(
    source: str | Path,
    destination: str | Path,
    *,
    mesh: str | None = None,
    file_format: NativeFormat = "dcp",
    dtype: str | None = None,
    dequantize: bool = False,
    family: str | None = None,
    dialect: str | None = None,
    like: str | Path | None = None,
    revision: str | None = None,
    max_file_size: str | int = "5GB",
    overwrite: bool = False,
    reflink: Reflink = "auto",
    digests: bool = False,
    threads: int | None = None,
    memory: str | int | None = None,
    sha256: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> CopyReport:
    """Makes a native checkpoint out of a Hugging Face repository, or out of a native one of another mesh.

    Args:
        source: a directory, `org/name`, `org/name@revision`, `hf://org/name`, or a URL such as `s3://bucket/name`.
        destination: directory to make; `torch.distributed.checkpoint.load` reads it.
        mesh: `dp_shard=2,ep=4` to lay the files out for the ranks of that mesh; any mesh can load any of them.
        file_format: `dcp` or `safetensors`.
        dtype: cast floating-point tensors; None keeps every dtype.
        dequantize: turn FP8 and MXFP4 tensors into BF16, or into F32 where `dtype` asks for it, unrounded; the native
            layout holds no codes, so a quantised source is refused otherwise.
        family: name of the family, `identity` to keep names; None reads it from config.json.
        dialect: whose names a trainer's checkpoint has, such as `torchtitan`; None finds it out from the names.
        like: a repository of the same model, for a checkpoint without config.json and tokenizer of its own.
        revision: of a Hub repository.
        max_file_size: size of a file when no mesh is given, such as `5GB`.
        overwrite: replace an existing destination, which stays until the new one is whole.
        reflink: share the blocks of tensors with the source where the file system can (`auto`), copy all bytes
            (`never`), or refuse where it cannot (`always`). Either side can be changed or deleted afterwards.
        digests: read shared tensors, too, as copying does. Otherwise they have the digests that the source's manifest
            records, and none where it has none.
        threads: worker threads.
        memory: bound of buffers, such as `64MB`.
        sha256: write `SHA256SUMS`, the SHA-256 of every file; it takes one more read of the output.
        dry_run: plan and prove only.
        progress: told of bytes as they move.
        ranks: from `join_ranks`, the processes that share the work; None for this one alone.
    """
    started = time.perf_counter()
    resolved = resolve_source(str(source), revision=revision)
    checkpoint = opened(resolved.path, family=family, dialect=dialect, like=like)
    plan = plan_conversion(
        checkpoint,
        destination,
        mesh=mesh,
        file_format=file_format,
        dtype=dtype,
        dequantize=dequantize,
        max_file_size=max_file_size,
        reflink=reflink,
        ranks=ranks,
    )
    options = _options(overwrite, threads, memory, progress, reflink, digests, sha256)
    copied = None
    if not dry_run:
        side_files = native_side_files(checkpoint)
        copied = run_plan(plan, Path(destination), _manifest(plan, resolved), side_files, options, ranks)
    return _report(plan, None if dry_run else destination, options, copied, started, ranks)


@by_url
def consolidate(
    source: str | Path,
    destination: str | Path,
    *,
    readers: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    family: str | None = None,
    dialect: str | None = None,
    like: str | Path | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    reflink: Reflink = "auto",
    digests: bool = False,
    threads: int | None = None,
    memory: str | int | None = None,
    sha256: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> CopyReport:
    """Makes a Hugging Face repository out of a native or training checkpoint, ours or another trainer's.

    The tensors have the names of the published model, config.json carries what transformers 4 and 5, vLLM and SGLang
    read, and the tokenizer's files are the source's, byte for byte.

    Args:
        source: directory of the checkpoint, or its URL.
        destination: directory to make.
        readers: such as `vllm,sglang`: write what all of these accept, or refuse with the reason; None changes no
            tensor names and no values of config fields for any reader's sake.
        dtype: cast floating-point tensors; None keeps every dtype.
        quantize: `fp8` (blocks of 128x128), `fp8-channel` (a scale a row, compressed-tensors) or `mxfp4`, where the
            family is published in that form; None writes plain tensors.
        family: name of the family, `identity` to keep names; None reads it from config.json.
        dialect: as for `convert`.
        like: as for `convert`.
        max_shard_size: size of a file, such as `5GB`.
        overwrite: replace an existing destination, which stays until the new one is whole.
        reflink: share the blocks of tensors with the source where the file system can (`auto`), copy all bytes
            (`never`), or refuse where it cannot (`always`). Either side can be changed or deleted afterwards.
        digests: read shared tensors, too, as copying does. Otherwise they have the digests that the source's manifest
            records, and none where it has none.
        threads: worker threads.
        memory: bound of buffers, such as `64MB`.
        sha256: write `SHA256SUMS`, the SHA-256 of every file; it takes one more read of the output.
        dry_run: plan and prove only.
        progress: told of bytes as they move.
        ranks: from `join_ranks`, the processes that share the work; None for this one alone.
    """
    started = time.perf_counter()
    resolved = resolve_source(str(source))
    checkpoint = opened(resolved.path, family=family, form=quantize or "", dialect=dialect, like=like)
    plan, layout = plan_consolidation(
        checkpoint,
        destination,
        readers=readers,
        dtype=dtype,
        quantize=quantize,
        family=family,
        max_shard_size=max_shard_size,
        reflink=reflink,
        ranks=ranks,
    )
    options = _options(overwrite, threads, memory, progress, reflink, digests, sha256)
    copied = None
    if not dry_run:
        dtypes = {copy.name: copy.target.dtype for copy in plan.copies if copy.target}
        side_files = repository_side_files(plan.source.config, plan.source.side_root, layout, dtypes)
        copied = run_plan(plan, Path(destination), _manifest(plan, resolved), side_files, options, ranks)
    return _report(plan, None if dry_run else destination, options, copied, started, ranks)


@by_url
def plan(
    source: str | Path,
    *,
    to: str | None = None,
    mesh: str | None = None,
    file_format: NativeFormat = "dcp",
    dtype: str | None = None,
    dequantize: bool = False,
    quantize: str | None = None,
    readers: str | None = None,
    family: str | None = None,
    dialect: str | None = None,
    like: str | Path | None = None,
    revision: str | None = None,
    max_file_size: str | int = "5GB",
    reflink: Reflink = "auto",
    digests: bool = False,
    memory: str | int | None = None,
    threads: int | None = None,
) -> CopyReport:
    """What `convert` (to `native`) or `consolidate` (to `hf`) would do, proven from headers; nothing is written.

    Args:
        source: a checkpoint.
        to: `native` or `hf`; None takes `native` for a published repository and `hf` for anything else.
        mesh: as for `convert`.
        file_format: as for `convert`.
        dtype: as for both.
        dequantize: as for `convert`.
        quantize: as for `consolidate`.
        readers: as for `consolidate`.
        family: as for both.
        dialect: as for both.
        like: as for both.
        revision: of a Hub repository.
        max_file_size: size of a file.
        reflink: as for both; the output is taken to be made beside the source.
        digests: as for both.
        memory: bound of buffers.
        threads: worker threads.
    """
    started = time.perf_counter()
    path = resolve_source(str(source), revision=revision).path
    form = quantize or ""
    opened_as = partial(opened, path, family=family, dialect=dialect, like=like)
    checkpoint = opened_as(form=form if one_of("to", to or "native", ("native", "hf")) == "hf" else None)
    if to is None:
        to = "native" if checkpoint.side == "hf" and checkpoint.store.kind == "safetensors" else "hf"
        if to == "hf" and checkpoint.layout.form != form:
            checkpoint = opened_as(form=form)
    if to == "hf":
        planned, _ = plan_consolidation(
            checkpoint,
            "",
            readers=readers,
            dtype=dtype,
            quantize=quantize,
            family=family,
            max_shard_size=max_file_size,
            reflink=reflink,
        )
    else:
        planned = plan_conversion(
            checkpoint,
            "",
            mesh=mesh,
            file_format=file_format,
            dtype=dtype,
            dequantize=dequantize,
            max_file_size=max_file_size,
            reflink=reflink,
        )
    options = _options(False, threads, memory, None, reflink, digests, False)
    return _report(planned, None, options, None, started, None)


def _options(
    overwrite: bool,
    threads: int | None,
    memory: str | int | None,
    progress: Progress | None,
    reflink: Reflink,
    digests: bool,
    sha256: bool,
) -> CopyOptions:
    bound = None if memory is None else parse_size(memory)
    return CopyOptions(overwrite, threads, bound, progress, strict=reflink == "always", digests=digests, sha256=sha256)


def _manifest(plan: Plan, resolved: ResolvedSource) -> Manifest:
    remote = remote_files(plan.source.root)
    source = {"directory": plan.source.root.name} if remote is None else {"url": remote.url}
    if resolved.repository:
        source = {"repository": resolved.repository, "revision": resolved.revision or ""}
    layout = plan.source.layout
    return Manifest(layout.family, LAYOUT_VERSION, plan.side, TOOL, layout.leaf_form, source)


def _report(
    plan: Plan,
    destination: str | Path | None,
    options: CopyOptions,
    copied: Copied | None,
    started: float,
    ranks: Ranks | None,
) -> CopyReport:
    source: Checkpoint = plan.source
    dropped, ties = dict(source.dropped), source.layout.native_tied
    dropped.update({name: f"tied to {ties[name]} with the same values" for name in source.duplicates})
    per_thread = thread_bytes(plan)
    shared = shared_bytes(plan)
    threads = options.bounded_threads(per_thread, shared)
    if copied is None:
        unread = () if options.digests else plan.sharing.leaves.keys()
        copied = Copied(frozenset(), plan.sharing.nbytes(), len(unread) - len(known_digests(plan, unread)))
    return CopyReport(
        place(source.root),
        None if destination is None else str(destination),
        source.layout.family,
        source.side,
        source.spelling,
        source.prefix,
        plan.side,
        len(plan.copies),
        plan.nbytes_written,
        len(plan.target.store.files),
        sum(copy.changes_values and not (copy.dequantises or copy.quantises) for copy in plan.copies),
        sum(copy.dequantises for copy in plan.copies),
        sum(copy.quantises for copy in plan.copies),
        len(copied.rounded),
        copied.shared,
        copied.undigested,
        dropped,
        len(source.store.skipped),
        source.manifest.foreign_digests if source.manifest else "",
        threads * per_thread + shared,
        threads,
        ranks.world if ranks else 1,
        time.perf_counter() - started,
    )
