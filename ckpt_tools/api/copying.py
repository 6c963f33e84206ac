"""`convert` and `consolidate`, which make a checkpoint out of another, and `plan`, which says what they would do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from ckpt_tools.api.opening import opened
from ckpt_tools.api.reports import CopyReport
from ckpt_tools.core.dtypes import DType, parse_dtype
from ckpt_tools.core.errors import FormatError, NotFoundError, UsageError
from ckpt_tools.core.sizes import parse_size
from ckpt_tools.engine.bounds import CopyOptions, shared_bytes, thread_bytes
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.cloning import Reflink, block_for
from ckpt_tools.engine.copy import known_digests, run_plan
from ckpt_tools.engine.execute import Copied, Progress
from ckpt_tools.engine.manifest import Manifest
from ckpt_tools.engine.plan import Plan
from ckpt_tools.engine.ranks import OtherRank, Ranks
from ckpt_tools.engine.sharding import parse_mesh
from ckpt_tools.engine.sides import native_side_files, repository_side_files
from ckpt_tools.engine.targets import NativeFormat, plan_huggingface, plan_native
from ckpt_tools.families import get_family
from ckpt_tools.families.family import LAYOUT_VERSION
from ckpt_tools.families.readers import config_for, parse_readers
from ckpt_tools.formats.hub import ResolvedSource, resolve_source
from ckpt_tools.formats.remote import by_url, place, remote_files
from ckpt_tools.layouts.layout import Layout
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
    if checkpoint.is_encoded and not dequantize:
        raise UsageError(
            f"{source} is quantised ({checkpoint.layout.form}); the native layout holds plain floating point",
            hint="add --dequantize to turn it into BF16, or --family identity to copy its tensors as they are",
        )
    plan = plan_native(
        checkpoint,
        mesh=None if mesh is None else parse_mesh(mesh),
        file_format=_one_of("file_format", file_format, ("dcp", "safetensors")),
        dtype=_dtype(dtype),
        max_file_size=parse_size(max_file_size),
        layout=_own_layout(checkpoint),
        block=_block(reflink, checkpoint, destination, ranks),
    )
    _check_sharing(reflink, plan)
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
    if not checkpoint.config and family is None and checkpoint.store.kind != "safetensors":
        raise NotFoundError(
            f"{source} has no config.json, so its architecture is not known",
            hint="give a repository of the same model with --like, or --family identity to keep all names",
        )
    if readers is not None:
        checkpoint = _accepted(checkpoint, config_for(checkpoint.config, parse_readers(readers), quantize or ""))
    target = _target_layout(checkpoint, quantize)
    plan = plan_huggingface(
        checkpoint,
        dtype=_dtype(dtype),
        max_shard_size=parse_size(max_shard_size),
        layout=target,
        block=_block(reflink, checkpoint, destination, ranks),
    )
    _check_sharing(reflink, plan)
    options = _options(overwrite, threads, memory, progress, reflink, digests, sha256)
    copied = None
    if not dry_run:
        dtypes = {copy.name: copy.target.dtype for copy in plan.copies if copy.target}
        side_files = repository_side_files(checkpoint.config, checkpoint.side_root, target, dtypes)
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
    path = resolve_source(str(source), revision=revision).path
    if to is None:
        checkpoint = opened(path, family=family, dialect=dialect, like=like)
        to = "native" if checkpoint.side == "hf" and checkpoint.store.kind == "safetensors" else "hf"
    if _one_of("to", to, ("native", "hf")) == "hf":
        return consolidate(
            path,
            "",
            readers=readers,
            dtype=dtype,
            quantize=quantize,
            family=family,
            dialect=dialect,
            like=like,
            max_shard_size=max_file_size,
            reflink=reflink,
            digests=digests,
            memory=memory,
            threads=threads,
            dry_run=True,
        )
    return convert(
        path,
        "",
        mesh=mesh,
        file_format=file_format,
        dtype=dtype,
        dequantize=dequantize,
        family=family,
        dialect=dialect,
        like=like,
        max_file_size=max_file_size,
        reflink=reflink,
        digests=digests,
        memory=memory,
        threads=threads,
        dry_run=True,
    )


def _block(reflink: Reflink, source: Checkpoint, destination: str | Path, ranks: Ranks | None) -> int | None:
    if isinstance(ranks, OtherRank):
        return ranks.block()
    # A plan that names no destination is for one beside the source.
    out = Path(destination) if str(destination) else source.root.absolute()
    block = block_for(_one_of("reflink", reflink, get_args(Reflink)), source.root, source.store.files, out)
    if ranks is not None:
        ranks.tell_block(block)
    return block


def _check_sharing(reflink: Reflink, plan: Plan) -> None:
    if reflink == "always" and not plan.sharing.leaves:
        raise UsageError(
            f"no tensor of {plan.source.root} lies so that the output could share its blocks",
            hint="tensors that are small, cast or transposed are always copied; --reflink auto does that",
        )


def _accepted(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """`checkpoint` under a config that says the same otherwise: with tied weights, or with one tensor for each name."""
    if config == checkpoint.config:
        return checkpoint
    if checkpoint.layout.is_identity:
        raise UsageError(
            "--for asks for other tensor names, and the identity family keeps all names",
            hint="leave --family out, or --for",
        )
    tied = config.get("tie_word_embeddings", True)
    return replace(checkpoint if tied else checkpoint.untied(), config=config)


def _target_layout(checkpoint: Checkpoint, form: str | None) -> Layout:
    """The layout of a repository that is made out of a checkpoint, plain or in a quantised form."""
    if checkpoint.is_encoded:
        raise UsageError(
            f"{checkpoint.root} is already a Hugging Face repository, quantised ({checkpoint.layout.form})",
            hint="`ckpt convert --dequantize` makes a native checkpoint of it, which can be consolidated into any form",
        )
    if checkpoint.layout.is_identity:
        if form is None:
            return checkpoint.layout
        raise UsageError(f"{checkpoint.root} is of no known family, so its form {form!r} is not known either")
    get_family(checkpoint.layout.family).check_written(form or "")
    if checkpoint.layout.form == (form or ""):
        return checkpoint.layout
    family, names = get_family(checkpoint.layout.family), checkpoint.layout.leaves
    return family.layout(checkpoint.config, form=form or "", names=names)


def _own_layout(checkpoint: Checkpoint) -> Layout:
    """The layout of a native checkpoint that is made out of one, whoever named its tensors."""
    layout = checkpoint.layout
    if layout.dialect == "native":
        return layout
    return get_family(layout.family).layout(checkpoint.config, form=layout.form, names=layout.leaves)


def _dtype(text: str | None) -> DType | None:
    if text is None:
        return None
    try:
        dtype = parse_dtype(text)
    except FormatError as error:
        raise UsageError(f"--dtype {text}: {error.message}", hint=error.hint) from None
    if not dtype.is_float:
        raise UsageError(f"--dtype {text}: only BF16, F16, F32 and F64 can be cast to")
    return dtype


def _one_of(what: str, value: str, allowed: tuple[str, ...]):  # type: ignore[no-untyped-def]
    if value not in allowed:
        raise UsageError(f"{what} is {value!r}, not {' or '.join(allowed)}")
    return value


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
