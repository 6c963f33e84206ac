"""Whose tensors a checkpoint holds, from their names alone: which side of the layout, and whose names and arrangement.

Names as published and our own are looked at first. What else there is was written by another trainer: its wrappers'
parts are taken out of the names, what all of them begin with may be the place of the model in the saved state dict,
and the dialects of the family are tried. Exactly one has to fit; shapes are never consulted.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

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
    elif not _is_foreign(store.tensors, chosen):
        # The common case, without a second look at the names.
        reading = _read(store, _Candidate("", dialect, store.tensors, 0), chosen, config, form)
        if not reading.faults:
            return reading
    candidates = _candidates(store, chosen, dialect, where)
    fitting: list[Recognised] = []
    for candidate in candidates:
        if candidate.strangers and candidate.spelling in DIALECTS:
            continue
        reading = _read(store, candidate, chosen, config, form)
        if not reading.faults:
            if candidate.spelling not in DIALECTS:
                return reading
            fitting.append(reading)
    if len(fitting) > 1:
        raise UsageError(
            f"{where} can be read as " + " and as ".join(reading.spelling for reading in fitting),
            hint="choose one with --dialect",
        )
    if not fitting:
        _refuse(store, candidates, chosen, config, form, where)
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


class _Candidate(NamedTuple):
    """A way to read the names.

    Attributes:
        prefix: what they begin with.
        spelling: a dialect's, `hf` or `native`, or None for whichever of the last two is nearer.
        tensors: by name without the prefix.
        strangers: how many names differ from every template by more than indices.
    """

    prefix: str
    spelling: str | None
    tensors: dict[str, StoredTensor]
    strangers: int


def _candidates(store: Store, family: Family, dialect: str | None, where: Path) -> list[_Candidate]:
    """The readings that have something for them, a name without an index; published and own names come first."""
    cleaned = _renamed(store.tensors, "", WRAPPERS, where)
    own, published = _templates(family)
    found = []
    # What is published under other names is another model.
    for prefix in [""] if store.kind == "safetensors" else _prefixes(cleaned):
        tensors = _renamed(cleaned, prefix, frozenset(), where)
        patterns = {_pattern(name) for name in tensors}
        if dialect in OURS or (dialect is None and not _is_foreign(tensors, family)):
            strangers = min(_strangers(patterns, templates) for templates in (own, published))
            found.append(_Candidate(prefix, dialect, tensors, strangers))
        for name, known in DIALECTS.items():
            rules = known.rules_of(family.name, family.rules) if dialect in (None, name) else None
            said = {rule.native for rule in rules or ()}
            if name == dialect or not said.isdisjoint(tensors):
                strangers = _strangers(patterns, {*said, *known.dropped, *known.tied, *family.dropped})
                found.append(_Candidate(prefix, name, tensors, strangers))
    return found or [_Candidate("", dialect, cleaned, len(cleaned))]


def _templates(family: Family) -> tuple[set[str], set[str]]:
    """The templates of our names and of the published ones."""
    leaves = {leaf.template for rule in family.rules for leaf in rule.value.leaves()}
    return {rule.native for rule in family.rules}, leaves


def _is_foreign(names: Collection[str], family: Family) -> bool:
    """Whether none of the names without an index is published or ours."""
    return not any(name in names for templates in _templates(family) for name in templates)


def _pattern(template: str) -> str:
    """A name or a template with `*` for each index."""
    return ".".join("*" if part.isdecimal() or part.startswith("{") else part for part in template.split("."))


def _strangers(patterns: Set[str], templates: Iterable[str]) -> int:
    return len(patterns - {_pattern(template) for template in templates})


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


def _read(store: Store, candidate: _Candidate, family: Family, config: Mapping[str, Any], form: str) -> Recognised:
    """Names read as a dialect's; or as published ones or our own, whichever are nearer, where neither is given."""
    tensors, spelling = candidate.tensors, candidate.spelling
    dialect = DIALECTS.get(spelling or "")
    layout = family.layout(config, names=tensors.keys(), form=form if dialect else None, dialect=dialect)
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
    return Recognised(layout, side, candidate.prefix, left, dropped, duplicates)


def _refuse(
    store: Store,
    candidates: Sequence[_Candidate],
    family: Family,
    config: Mapping[str, Any],
    form: str,
    where: Path,
) -> None:
    """Raises the error that tells how far the nearest readings are from fitting."""
    fewest = min(candidate.strangers for candidate in candidates)
    readings = [_read(store, c, family, config, form) for c in candidates if c.strangers == fewest]
    nearest = min(readings, key=lambda reading: reading.faults)
    tried = dict.fromkeys(f"{c.spelling}" if c.spelling else " or ".join(OURS) for c in candidates)
    hint = None
    if len(tried) > 1:
        hint = f"these are the nearest of {', '.join(tried)} names; --dialect chooses"
    place = f"{where} (without the prefix {nearest.prefix})" if nearest.prefix else str(where)
    nearest.layout.check_names(nearest.tensors, nearest.side, place, hint=hint)
