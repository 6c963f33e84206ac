"""What the verbs of the command line do, as functions with the same parameters, returning dataclasses.

    from ckpt_tools import convert, consolidate, verify

Nothing is printed here and nothing exits. Every function raises `ckpt_tools.CkptError` when the input, the machine or
the arguments are at fault, and an output that could not be completed does not appear.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_tools.core.dtypes import DType, parse_dtype
from ckpt_tools.core.errors import FormatError, UsageError
from ckpt_tools.core.sizes import parse_size
from ckpt_tools.engine import describe
from ckpt_tools.engine.checkpoint import Checkpoint, open_checkpoint
from ckpt_tools.engine.copy import CopyOptions, run_plan, thread_bytes
from ckpt_tools.engine.describe import Difference, Explanation, TensorGroup
from ckpt_tools.engine.execute import Progress
from ckpt_tools.engine.manifest import Manifest
from ckpt_tools.engine.plan import Plan
from ckpt_tools.engine.sharding import parse_mesh
from ckpt_tools.engine.sides import native_side_files, repository_side_files
from ckpt_tools.engine.targets import NativeFormat, plan_huggingface, plan_native
from ckpt_tools.engine.verify import Checks, check_duplicates, compare, verify_digests, verify_structure
from ckpt_tools.families import FAMILIES, get_family
from ckpt_tools.families.family import LAYOUT_VERSION
from ckpt_tools.families.readers import config_for, parse_readers
from ckpt_tools.formats.hub import ResolvedSource, resolve_source
from ckpt_tools.layouts.layout import Layout
from ckpt_tools.version import TOOL


@dataclass(frozen=True)
class CopyReport:
    """What a conversion or consolidation did, or would do.

    Attributes:
        source: directory that was read.
        destination: directory that was made; None for a dry run.
        family: name of the family, `identity` where names stay as they are.
        source_side: `hf` or `native`.
        target_side: `hf` or `native`.
        tensors: number of Hugging Face tensors that were moved.
        nbytes: bytes of all files with tensors.
        files: number of files with tensors.
        casts: number of tensors whose dtype changed by a cast.
        dequantized: number of tensors that were stored quantised and are plain now.
        quantized: number of tensors that are stored quantised now.
        rounded: number of those that do not read back bit for bit as the values that they were made of; 0 for a dry
            run, which reads none.
        dropped: names that were left out on purpose, with the reason.
        skipped: number of entries that are not weights of the model (optimizer state, byte blobs).
        memory: upper bound of the buffers in bytes.
        threads: worker threads.
        seconds: wall time, planning included.
    """

    source: str
    destination: str | None
    family: str
    source_side: str
    target_side: str
    tensors: int
    nbytes: int
    files: int
    casts: int
    dequantized: int
    quantized: int
    rounded: int
    dropped: dict[str, str]
    skipped: int
    memory: int
    threads: int
    seconds: float


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` checked; reaching it means that every check passed."""

    path: str
    family: str
    side: str
    tensors: int
    elements: int
    nbytes: int
    checks: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class RoundtripReport:
    """A checkpoint converted, consolidated and found equal bit for bit."""

    source: str
    family: str
    tensors: int
    nbytes: int
    convert_seconds: float
    consolidate_seconds: float
    verify_seconds: float


@dataclass(frozen=True)
class InspectReport:
    """What a checkpoint holds, from its headers."""

    path: str
    format: str
    family: str
    side: str
    tensors: int
    parameters: int
    nbytes: int
    files: dict[str, int]
    groups: tuple[TensorGroup, ...]
    skipped: dict[str, str]
    dropped: tuple[str, ...]
    side_files: tuple[str, ...]
    manifest: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FamilyReport:
    """One supported family; `data_only` ones have no native model and train through transformers' class."""

    name: str
    title: str
    architecture: str
    model_types: tuple[str, ...]
    data_only: bool
    rules: tuple[tuple[str, str], ...]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    mesh: str | None = None,
    file_format: NativeFormat = "dcp",
    dtype: str | None = None,
    dequantize: bool = False,
    family: str | None = None,
    revision: str | None = None,
    max_file_size: str | int = "5GB",
    overwrite: bool = False,
    threads: int | None = None,
    memory: str | int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CopyReport:
    """Makes a native checkpoint out of a Hugging Face repository, or out of a native one of another mesh.

    Args:
        source: a directory, `org/name`, `org/name@revision` or `hf://org/name`.
        destination: directory to make; `torch.distributed.checkpoint.load` reads it.
        mesh: `dp_shard=2,ep=4` to lay the files out for the ranks of that mesh; any mesh can load any of them.
        file_format: `dcp` or `safetensors`.
        dtype: cast floating-point tensors; None keeps every dtype.
        dequantize: turn FP8 and MXFP4 tensors into BF16, or into F32 where `dtype` asks for it, unrounded; the native
            layout holds no codes, so a quantised source is refused otherwise.
        family: name of the family, `identity` to keep names; None reads it from config.json.
        revision: of a Hub repository.
        max_file_size: size of a file when no mesh is given, such as `5GB`.
        overwrite: replace an existing destination, which stays until the new one is whole.
        threads: worker threads.
        memory: bound of buffers, such as `64MB`.
        dry_run: plan and prove only.
        progress: told of bytes as they move.
    """
    started = time.perf_counter()
    resolved = resolve_source(str(source), revision=revision)
    checkpoint = open_checkpoint(resolved.path, family=family)
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
    )
    options = _options(overwrite, threads, memory, progress)
    rounded: frozenset[str] = frozenset()
    if not dry_run:
        check_duplicates(checkpoint)
        side_files = native_side_files(checkpoint)
        rounded = run_plan(plan, Path(destination), _manifest(plan, resolved), side_files, options)
    return _report(plan, None if dry_run else destination, options, rounded, started)


def consolidate(
    source: str | Path,
    destination: str | Path,
    *,
    readers: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    family: str | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    threads: int | None = None,
    memory: str | int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CopyReport:
    """Makes a Hugging Face repository out of a native or training checkpoint.

    The tensors have the names of the published model, config.json carries what transformers 4 and 5, vLLM and SGLang
    read, and the tokenizer's files are the source's, byte for byte.

    Args:
        source: directory of the checkpoint.
        destination: directory to make.
        readers: such as `vllm,sglang`: write what all of these accept, or refuse with the reason; None changes no
            tensor names and no values of config fields for any reader's sake.
        dtype: cast floating-point tensors; None keeps every dtype.
        quantize: `fp8` (blocks of 128x128), `fp8-channel` (a scale a row, compressed-tensors) or `mxfp4`, where the
            family is published in that form; None writes plain tensors.
        family: name of the family, `identity` to keep names; None reads it from config.json.
        max_shard_size: size of a file, such as `5GB`.
        overwrite: replace an existing destination, which stays until the new one is whole.
        threads: worker threads.
        memory: bound of buffers, such as `64MB`.
        dry_run: plan and prove only.
        progress: told of bytes as they move.
    """
    started = time.perf_counter()
    resolved = resolve_source(str(source))
    checkpoint = open_checkpoint(resolved.path, family=family, form=quantize or "")
    if readers is not None:
        checkpoint = _accepted(checkpoint, config_for(checkpoint.config, parse_readers(readers), quantize or ""))
    target = _target_layout(checkpoint, quantize)
    plan = plan_huggingface(checkpoint, dtype=_dtype(dtype), max_shard_size=parse_size(max_shard_size), layout=target)
    options = _options(overwrite, threads, memory, progress)
    rounded: frozenset[str] = frozenset()
    if not dry_run:
        check_duplicates(checkpoint)
        dtypes = {copy.name: copy.target.dtype for copy in plan.copies if copy.target}
        side_files = repository_side_files(checkpoint.config, checkpoint.side_root, target, dtypes)
        rounded = run_plan(plan, Path(destination), _manifest(plan, resolved), side_files, options)
    return _report(plan, None if dry_run else destination, options, rounded, started)


def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    family: str | None = None,
    digests: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Proves that a checkpoint is whole, has the values that were written, and equals another one.

    Args:
        path: any checkpoint: Hugging Face repository, native, or saved by training.
        against: another one of the same model, on either side of the layout; compared bit for bit.
        family: name of the family; None reads it from config.json.
        digests: compare the digests of the manifest, where there is one.
        threads: worker threads.
        progress: told of bytes as they are read.

    Raises:
        LayoutError: a tensor is missing, unexpected, incomplete or of the wrong shape.
        MismatchError: a value differs from its digest or from the other checkpoint.
    """
    started = time.perf_counter()
    checkpoint = open_checkpoint(resolve_source(str(path)).path, family=family)
    checks: Checks = verify_structure(checkpoint)
    check_duplicates(checkpoint)
    if digests:
        checks.done += verify_digests(checkpoint, threads=threads, progress=progress)
    if against is not None:
        other = open_checkpoint(resolve_source(str(against)).path, family=family, form=checkpoint.layout.form)
        # A native checkpoint can be seen against any form: against that of the other side.
        if other.layout.form != checkpoint.layout.form and checkpoint.side == "native":
            checkpoint = open_checkpoint(checkpoint.root, family=family, form=other.layout.form)
        count = compare(checkpoint, other, threads=threads, progress=progress)
        checks.done.append(f"values: {count:,} tensors equal those of {against} bit for bit")
    return VerifyReport(
        str(path),
        checkpoint.layout.family,
        checkpoint.side,
        checks.tensors,
        checks.elements,
        checks.nbytes,
        tuple(checks.done),
        time.perf_counter() - started,
    )


def roundtrip(
    source: str | Path,
    *,
    work: str | Path | None = None,
    mesh: str | None = None,
    family: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> RoundtripReport:
    """Converts a repository, consolidates the result and compares it with the source bit for bit.

    A quantised repository is dequantised on the way, and its values compared.

    Args:
        source: a directory or a Hub repository.
        work: directory for the two copies, which are removed; None takes the system's temporary directory.
        mesh: convert for this mesh.
        family: name of the family; None reads it from config.json.
        threads: worker threads.
        progress: told of bytes as they move.
    """
    path = resolve_source(str(source)).path
    with tempfile.TemporaryDirectory(prefix="ckpt-roundtrip-", dir=work) as folder:
        native, back = Path(folder, "native"), Path(folder, "hf")
        there = convert(path, native, mesh=mesh, dequantize=True, family=family, threads=threads, progress=progress)
        again = consolidate(native, back, family=family, threads=threads, progress=progress)
        # A quantised source is compared with what it was dequantised to, and that with the plain repository.
        encoded = open_checkpoint(path, family=family).is_encoded
        if encoded:
            verify(native, against=path, family=family, threads=threads, progress=progress)
        checked = verify(back, against=native if encoded else path, family=family, threads=threads, progress=progress)
    return RoundtripReport(
        str(source), there.family, checked.tensors, checked.nbytes, there.seconds, again.seconds, checked.seconds
    )


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
    revision: str | None = None,
    max_file_size: str | int = "5GB",
    memory: str | int | None = None,
    threads: int | None = None,
) -> CopyReport:
    """What `convert` (to `native`) or `consolidate` (to `hf`) would do, proven from headers; nothing is written.

    Args:
        source: a checkpoint.
        to: `native` or `hf`; None takes the side that the source is not.
        mesh: as for `convert`.
        file_format: as for `convert`.
        dtype: as for both.
        dequantize: as for `convert`.
        quantize: as for `consolidate`.
        readers: as for `consolidate`.
        family: as for both.
        revision: of a Hub repository.
        max_file_size: size of a file.
        memory: bound of buffers.
        threads: worker threads.
    """
    path = resolve_source(str(source), revision=revision).path
    if to is None:
        to = "native" if open_checkpoint(path, family=family).side == "hf" else "hf"
    if _one_of("to", to, ("native", "hf")) == "hf":
        return consolidate(
            path,
            "",
            readers=readers,
            dtype=dtype,
            quantize=quantize,
            family=family,
            max_shard_size=max_file_size,
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
        max_file_size=max_file_size,
        memory=memory,
        threads=threads,
        dry_run=True,
    )


def inspect(path: str | Path, *, family: str | None = None) -> InspectReport:
    """What a checkpoint holds, from its headers."""
    checkpoint = open_checkpoint(resolve_source(str(path)).path, family=family)
    store, manifest = checkpoint.store, checkpoint.manifest
    return InspectReport(
        str(path),
        store.kind,
        checkpoint.layout.family,
        checkpoint.side,
        len(store.tensors),
        sum(t.numel for t in store.tensors.values()),
        store.nbytes,
        dict(store.files),
        tuple(describe.group_tensors(store)),
        dict(store.skipped),
        (*checkpoint.dropped, *checkpoint.duplicates),
        checkpoint.side_files,
        {"tool": manifest.tool, **manifest.source} if manifest else {},
    )


def diff(left: str | Path, right: str | Path, *, family: str | None = None) -> list[Difference]:
    """Tensors that two checkpoints do not have in common, or have with another shape or dtype. Values are not read."""
    return describe.differences(
        open_checkpoint(resolve_source(str(left)).path, family=family),
        open_checkpoint(resolve_source(str(right)).path, family=family),
    )


def explain(path: str | Path, name: str, *, family: str | None = None) -> list[Explanation]:
    """What a tensor's name is on the other side of the layout, and how it is made."""
    return describe.explain(open_checkpoint(resolve_source(str(path)).path, family=family).layout, name)


def list_families() -> list[FamilyReport]:
    """The families that have a native layout; everything else keeps its names (`identity`)."""
    return [
        FamilyReport(
            family.name,
            family.title,
            family.architecture,
            family.model_types,
            family.data_only,
            tuple((rule.native, rule.value.describe()) for rule in family.rules),
        )
        for family in map(get_family, FAMILIES)
    ]


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
    family, names = get_family(checkpoint.layout.family), checkpoint.layout.native
    return family.layout(checkpoint.config, form=form or "", names=names)


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


def _options(overwrite: bool, threads: int | None, memory: str | int | None, progress: Progress | None) -> CopyOptions:
    return CopyOptions(overwrite, threads, None if memory is None else parse_size(memory), progress)


def _manifest(plan: Plan, resolved: ResolvedSource) -> Manifest:
    source = {"directory": plan.source.root.name}
    if resolved.repository:
        source = {"repository": resolved.repository, "revision": resolved.revision or ""}
    layout = plan.source.layout
    return Manifest(layout.family, LAYOUT_VERSION, plan.side, TOOL, layout.leaf_form, source)


def _report(
    plan: Plan, destination: str | Path | None, options: CopyOptions, rounded: frozenset[str], started: float
) -> CopyReport:
    source: Checkpoint = plan.source
    dropped = dict(source.dropped)
    dropped.update({name: f"tied to {source.layout.tied[name]} with the same values" for name in source.duplicates})
    per_thread = thread_bytes(plan)
    threads = options.bounded_threads(per_thread)
    return CopyReport(
        str(source.root),
        None if destination is None else str(destination),
        source.layout.family,
        source.side,
        plan.side,
        len(plan.copies),
        plan.nbytes_written,
        len(plan.target.store.files),
        sum(copy.changes_values and not (copy.dequantises or copy.quantises) for copy in plan.copies),
        sum(copy.dequantises for copy in plan.copies),
        sum(copy.quantises for copy in plan.copies),
        len(rounded),
        dropped,
        len(source.store.skipped),
        threads * per_thread,
        threads,
        time.perf_counter() - started,
    )
