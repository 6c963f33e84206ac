"""Whose tensors a checkpoint holds, from their names alone: which side of the layout, and whose names and arrangement.

Names as published and our own are looked at first. What else there is was written by another trainer: its wrappers'
parts are taken out of the names, what all of them begin with may be the place of the model in the saved state dict,
and the dialects of the family are tried. Exactly one has to fit; shapes are never consulted.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ckpt_tools.core.errors import FormatError, UsageError
from ckpt_tools.core.names import match
from ckpt_tools.core.tensors import Store, StoredTensor
from ckpt_tools.families import family_of, get_family
from ckpt_tools.families.dialects import DIALECTS, OURS, get_dialect
from ckpt_tools.families.family import Family
from ckpt_tools.layouts.layout import Layout, Side, identity

_PRIVATE_WRAPPERS: Final = frozenset(
    {"_checkpoint_wrapped_module", "_forward_module", "_fsdp_wrapped_module", "_orig_mod", "_original_module"}
)
WRAPPERS: Final = _PRIVATE_WRAPPERS | {"module"}
"""Parts of names that activation checkpointing, Fabric, FSDP1, torch.compile and DDP leave; no family has them."""

_ACTIVATION_SCALE: Final = "a scale of activations, which plain weights lack"


@dataclass(frozen=True)
class Recognised:
    """A reading of a store's names.

    Attributes:
        layout: its correspondence.
        side: which side of it the names are.
        prefix: what every name begins with beside the model's own, such as `model.`.
        tensors: by name without prefix and wrappers; tied duplicates and dropped ones are not among them.
        dropped: names left out because they have no place on the other side, with the reason.
        duplicates: tied names that the files hold although the config shares them.
    """

    layout: Layout
    side: Side
    prefix: str
    tensors: dict[str, StoredTensor]
    dropped: dict[str, str]
    duplicates: dict[str, StoredTensor]

    @property
    def spelling(self) -> str:
        return self.layout.spelling(self.side)

    @property
    def faults(self) -> int:
        """Names that are missing or unexpected."""
        return len(self.layout.shapes(self.side).keys() ^ self.tensors.keys())


def recognise(
    store: Store, config: Mapping[str, Any], *, family: str | None, dialect: str | None, form: str, where: Path
) -> Recognised:
    """The one reading of a store's names that fits its config.

    Args:
        store: the opened files.
        config: content of config.json.
        family: its name, `identity` for names as they are; None reads it from the config.
        dialect: whose names they are: `hf`, `native`, or another one's; None finds it out.
        form: of the Hugging Face side that native tensors are seen against, empty for the plain one.
        where: the checkpoint, for messages.

    Raises:
        LayoutError: no reading fits; the nearest one's missing and unexpected names are listed.
        UsageError: several do, or the dialect is none of the family's.
    """
    chosen = None if family == "identity" else get_family(family) if family else family_of(config)
    if chosen is None:
        return _as_they_are(store, dialect, where)
    if dialect is not None and dialect not in OURS:
        get_dialect(dialect)
    elif not (plain := _read(store, store.tensors, "", chosen, config, dialect, form)).faults:
        return plain
    readings = list(_readings(store, chosen, config, dialect, form, where))
    fitting = [reading for reading in readings if not reading.faults]
    if len(fitting) > 1:
        raise UsageError(
            f"{where} can be read as " + " and as ".join(reading.spelling for reading in fitting),
            hint="choose one with --dialect",
        )
    if not fitting:
        _refuse(readings, where)
    return fitting[0]


def _as_they_are(store: Store, dialect: str | None, where: Path) -> Recognised:
    """An architecture without a layout: names as in the model's own state dict, without private wrappers."""
    if dialect not in (None, "hf"):
        raise UsageError(
            f"--dialect {dialect}: {where} is of no known family, so its names cannot be translated",
            hint="give a repository of the same model with --like, or its --family",
        )
    prefix = f"{store.nested}." if store.nested else ""
    tensors = _renamed(store.tensors, prefix, _PRIVATE_WRAPPERS, where)
    return Recognised(identity({name: t.shape for name, t in tensors.items()}), "hf", prefix, tensors, {}, {})


def _readings(
    store: Store, family: Family, config: Mapping[str, Any], dialect: str | None, form: str, where: Path
) -> Iterator[Recognised]:
    """The readings worth comparing, published and own names first: others need a name of theirs without an index."""
    cleaned = _renamed(store.tensors, "", WRAPPERS, where)
    # What is published under other names is another model.
    for prefix in [""] if store.kind == "safetensors" else _prefixes(cleaned):
        tensors = _renamed(cleaned, prefix, frozenset(), where)
        spellings = [None, *DIALECTS] if dialect is None else [dialect]
        for spelling in spellings:
            rules = DIALECTS[spelling].rules_of(family.name, family.rules) if spelling in DIALECTS else ()
            if dialect or spelling is None or any(rule.native in tensors for rule in rules or ()):
                yield _read(store, tensors, prefix, family, config, spelling, form)


def _prefixes(names: Collection[str]) -> list[str]:
    """What all names begin with, part by part: nothing, `model.`, `model.model.`."""
    # What the first and the last name in order have in common, all have.
    ends = (name.split(".")[:-1] for name in (min(names, default=""), max(names, default="")))
    common = [first for first, last in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False))]
    return ["".join(f"{part}." for part in common[:count]) for count in range(len(common) + 1)]


def _renamed(
    tensors: dict[str, StoredTensor], prefix: str, wrappers: frozenset[str], where: Path
) -> dict[str, StoredTensor]:
    """Tensors by their names without `prefix` and without the parts that wrappers leave."""
    found: dict[str, StoredTensor] = {}
    for stored, tensor in tensors.items():
        parts = stored.removeprefix(prefix).split(".")
        name = ".".join(part for part in parts if part not in wrappers) or stored
        if name in found:
            raise FormatError(f"{where}: {stored} and another name are both {name} without wrappers")
        found[name] = tensor if name == tensor.name else replace(tensor, name=name)
    return found


def _read(
    store: Store,
    tensors: dict[str, StoredTensor],
    prefix: str,
    family: Family,
    config: Mapping[str, Any],
    spelling: str | None,
    form: str,
) -> Recognised:
    """Names read as a dialect's; as published ones or our own, whichever are nearer, where none is given."""
    dialect = DIALECTS.get(spelling or "")
    form_here = form if dialect else None
    layout = family.layout(config, names=tensors.keys(), form=form_here, dialect=dialect)
    own = layout.native.keys() if dialect else frozenset()
    dropped = {
        name: reason
        for template, reason in layout.dropped.items()
        for name in tensors
        if name not in own and match(template, name)
    }
    dropped |= dict.fromkeys(layout.beside & tensors.keys(), _ACTIVATION_SCALE)
    duplicates = {name: tensors[name] for name in layout.native_tied if name in tensors}
    left = {name: tensor for name, tensor in tensors.items() if name not in dropped and name not in duplicates}
    side: Side = "native" if dialect else layout.side_of(left, tie="hf" if store.kind == "safetensors" else "native")
    if spelling in OURS:
        side = "hf" if spelling == "hf" else "native"
    if side == "native" and form and not dialect:
        layout = family.layout(config, form=form, names=left.keys())
    return Recognised(layout, side, prefix, left, dropped, duplicates)


def _refuse(readings: Sequence[Recognised], where: Path) -> None:
    """Raises the error that tells how far the nearest reading is from fitting."""
    nearest = min(readings, key=lambda reading: reading.faults)
    names = list(dict.fromkeys(reading.spelling for reading in readings))
    hint = None
    if len(names) > 1:
        hint = f"these are the nearest of {', '.join(names)}; --dialect chooses one of them"
    place = f"{where} (without the prefix {nearest.prefix})" if nearest.prefix else str(where)
    nearest.layout.check_names(nearest.tensors, nearest.side, place, hint=hint)
