"""The plans of `convert` and `consolidate`, made and proven from an opened checkpoint; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from ckpt_tools.core.dtypes import DType, parse_dtype
from ckpt_tools.core.errors import FormatError, NotFoundError, UsageError
from ckpt_tools.core.sizes import parse_size
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.cloning import Reflink, block_for
from ckpt_tools.engine.plan import Plan
from ckpt_tools.engine.ranks import OtherRank, Ranks
from ckpt_tools.engine.sharding import parse_mesh
from ckpt_tools.engine.targets import NativeFormat, plan_huggingface, plan_native
from ckpt_tools.families import get_family
from ckpt_tools.families.readers import config_for, parse_readers
from ckpt_tools.layouts.layout import Layout

T = TypeVar("T", bound=str)


def plan_conversion(
    checkpoint: Checkpoint,
    destination: str | Path,
    *,
    mesh: str | None,
    file_format: NativeFormat,
    dtype: str | None,
    dequantize: bool,
    max_file_size: str | int,
    reflink: Reflink,
    ranks: Ranks | None = None,
) -> Plan:
    """The plan of `convert`, whose arguments these are; without a destination, of one beside the source."""
    if checkpoint.is_encoded and not dequantize:
        raise UsageError(
            f"{checkpoint.root} is quantised ({checkpoint.layout.form}); the native layout holds plain floating point",
            hint="add --dequantize to turn it into BF16, or --family identity to copy its tensors as they are",
        )
    plan = plan_native(
        checkpoint,
        mesh=None if mesh is None else parse_mesh(mesh),
        file_format=one_of("file_format", file_format, ("dcp", "safetensors")),
        dtype=_dtype(dtype),
        max_file_size=parse_size(max_file_size),
        layout=_own_layout(checkpoint),
        block=_block(reflink, checkpoint, destination, ranks),
    )
    _check_sharing(reflink, plan)
    return plan


def plan_consolidation(
    checkpoint: Checkpoint,
    destination: str | Path,
    *,
    readers: str | None,
    dtype: str | None,
    quantize: str | None,
    family: str | None,
    max_shard_size: str | int,
    reflink: Reflink,
    ranks: Ranks | None = None,
) -> tuple[Plan, Layout]:
    """The plan of `consolidate`, whose arguments these are, and the layout of what it makes."""
    if not checkpoint.config and family is None and checkpoint.store.kind != "safetensors":
        raise NotFoundError(
            f"{checkpoint.root} has no config.json, so its architecture is not known",
            hint="give a repository of the same model with --like, or --family identity to keep all names",
        )
    if readers is not None:
        checkpoint = _accepted(checkpoint, config_for(checkpoint.config, parse_readers(readers), quantize or ""))
    layout = _target_layout(checkpoint, quantize)
    plan = plan_huggingface(
        checkpoint,
        dtype=_dtype(dtype),
        max_shard_size=parse_size(max_shard_size),
        layout=layout,
        block=_block(reflink, checkpoint, destination, ranks),
    )
    _check_sharing(reflink, plan)
    return plan, layout


def _block(reflink: Reflink, source: Checkpoint, destination: str | Path, ranks: Ranks | None) -> int | None:
    if isinstance(ranks, OtherRank):
        return ranks.block()
    # A plan that names no destination is for one beside the source.
    out = Path(destination) if str(destination) else source.root.absolute()
    block = block_for(one_of("reflink", reflink, get_args(Reflink)), source.root, source.store.files, out)
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


def one_of(what: str, value: T, allowed: tuple[str, ...]) -> T:
    """The value, if it is one of those that an argument may have; a `UsageError` otherwise."""
    if value not in allowed:
        raise UsageError(f"{what} is {value!r}, not {' or '.join(allowed)}")
    return value
