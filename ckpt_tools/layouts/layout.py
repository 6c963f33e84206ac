"""A family's rules resolved for one config: every expected name, shape and piece on both sides.

`Shape` carries what a config says (sizes, kinds of layers, flags); `Layout` is the result that the rest of the
project works with. Resolving opens no file and allocates no tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal

from ckpt_tools.core.errors import LayoutError, listed
from ckpt_tools.core.names import fields, fill, nearest
from ckpt_tools.layouts import algebra
from ckpt_tools.layouts.algebra import View
from ckpt_tools.layouts.encodings import Encoding, Part
from ckpt_tools.layouts.rules import Leaf, Rule, Scope

Side = Literal["hf", "native"]
"""The two sides of a layout: the published tensors, and those that a trainer holds, made of them by the rules."""

BUFFER = "a buffer that holds no weights"


@dataclass(frozen=True)
class Shape:
    """What a family reads out of a config.

    Attributes:
        sizes: numbers behind the size names of the rules.
        layers: kind of each layer, in order, for example `("dense", "moe", "moe")`; one with several properties has
            them joined by `+`, for example `decoder+mamba`. Layers that `predict` further tokens come last.
        experts: number of experts, the length of the `{expert}` axis.
        flags: conditions that hold, for rules with `when`.
    """

    sizes: Mapping[str, int]
    layers: tuple[str, ...]
    experts: int = 0
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class LeafTensor:
    """A tensor expected in the Hugging Face repository."""

    name: str
    shape: tuple[int, ...]
    keep_dtype: bool = False
    encoding: Encoding | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class NativeTensor:
    """A tensor of the native model, as a view of leaves.

    Attributes:
        name: its name.
        pattern: the view; its pieces name leaves by templates, so that tensors that differ in names alone share it.
        leaves: names of the leaves, one for each of `pattern.leaves`.
        rule: that made it, None for identity.
    """

    name: str
    pattern: View
    leaves: tuple[str, ...]
    rule: Rule | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pattern.shape

    @property
    def view(self) -> View:
        """The pattern with the names of the leaves in place of templates."""
        names = dict(zip(self.pattern.leaves, self.leaves, strict=True))
        return View(self.shape, tuple(replace(piece, leaf=names[piece.leaf]) for piece in self.pattern.pieces))


@dataclass(frozen=True)
class Layout:
    """The correspondence between a Hugging Face repository and a native checkpoint.

    Attributes:
        family: name of the family, `identity` where names are the same on both sides.
        native: tensors of the native side by name.
        leaves: tensors of the Hugging Face side by name.
        dialect: whose names and arrangement the native side has: `native` is ours.
        tied: name on disk that may be absent because it shares the weights of another name.
        native_tied: the same in names of the native side; ours are those on disk.
        lent: leaves that no native tensor holds, with the leaf whose values they have.
        dropped: templates of names that have no place on the other side, with the reason.
        stacked: native names that are stacked over experts along dimension 0.
        form: name of the Hugging Face side's form, such as `fp8`; empty for the one in plain floating point.
        leaf_form: name of the form whose rules name the leaves: `form` where it has rules of its own, else empty.
        layers: kind of each layer that is there, in order.
        beside: names that may lie beside quantised leaves and hold no weights.
    """

    family: str
    native: Mapping[str, NativeTensor]
    leaves: Mapping[str, LeafTensor]
    dialect: str = "native"
    tied: Mapping[str, str] = field(default_factory=dict)
    native_tied: Mapping[str, str] = field(default_factory=dict)
    lent: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    stacked: frozenset[str] = frozenset()
    form: str = ""
    leaf_form: str = ""
    layers: tuple[str, ...] = ()
    beside: frozenset[str] = frozenset()

    @property
    def is_identity(self) -> bool:
        return self.family == "identity"

    @property
    def keeps_dtype(self) -> frozenset[str]:
        """Native names whose leaves keep their dtype whatever the model's (FP32 state)."""
        kept = {name for name, leaf in self.leaves.items() if leaf.keep_dtype}
        return frozenset(name for name, tensor in self.native.items() if kept.issuperset(tensor.leaves))

    @cached_property
    def parts(self) -> Mapping[str, tuple[Part, ...]]:
        """The stored tensors of each leaf that is encoded, by the name of the leaf."""
        leaves = self.leaves.values()
        return {leaf.name: leaf.encoding.parts(leaf.name, leaf.shape) for leaf in leaves if leaf.encoding}

    def shapes(self, side: Side) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor that a checkpoint of this side stores, by name."""
        return self._native_shapes if side == "native" else self._published_shapes

    @cached_property
    def _native_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.native.items()}

    @cached_property
    def _published_shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for name, leaf in self.leaves.items():
            if leaf.encoding is None:
                found[name] = leaf.shape
            else:
                found.update((part.name, part.shape) for part in self.parts[name])
        return found

    def side_of(self, names: Iterable[str], *, tie: Side = "native") -> Side:
        """The side whose names these are, or the nearer one where they are neither's.

        Args:
            names: of a checkpoint or a model.
            tie: the answer where both sides are as near, because all names are the same on both.
        """
        found = set(names)
        native, published = len(found ^ self.native.keys()), len(found ^ self.shapes("hf").keys())
        return tie if native == published else "native" if native < published else "hf"

    def of_names(self, names: Iterable[str]) -> Layout:
        """This layout with those tensors on its native side that a model has: its own, or the leaves.

        A model of transformers 4 mostly holds the tensors of the files; its layout is that of the Hugging Face side
        with itself.
        """
        if self.side_of(names) == "native":
            return self
        native = _unchanged({name: leaf.shape for name, leaf in self.leaves.items()})
        return replace(self, native=native, stacked=frozenset())

    def spelling(self, side: Side) -> str:
        """Whose names a checkpoint of a side has: `hf`, `native`, or the name of another dialect."""
        return side if side == "hf" else self.dialect

    def check_names(self, found: Iterable[str], side: Side, where: str, hint: str | None = None) -> None:
        """Compares names with the expected ones of a side (`hf` or `native`).

        Raises:
            LayoutError: names are missing or unexpected; all of them are counted and the first listed.
        """
        expected = self.shapes(side)
        names = set(found)
        missing = sorted(expected.keys() - names)
        unexpected = sorted(names - expected.keys())
        if not missing and not unexpected:
            return
        spelled = f" under {self.dialect} names" if self.spelling(side) not in ("hf", "native") else ""
        lines = [f"{where} does not hold the tensors of a {self.family} model{spelled}:"]
        if missing:
            lines.append(f"{len(missing):,} missing\n{listed(missing)}")
        if unexpected:
            close = ((name, nearest(name, missing or expected)) for name in unexpected[:10])
            shown = [f"{name}  (nearest expected name: {near})" if near else name for name, near in close]
            lines.append(f"{len(unexpected):,} unexpected\n{listed(shown + unexpected[10:])}")
        usual = "`ckpt inspect` shows what is there, `ckpt explain` what is expected"
        raise LayoutError("\n".join(lines), hint=hint or usual)


EncodingOf = Callable[[str, str], "Encoding | None"]
"""(template, name) of a leaf -> how it is stored, None for as it is."""


def resolve(
    family: str, rules: Iterable[Rule], shape: Shape, encoding_of: EncodingOf | None = None, **extra: object
) -> Layout:
    """The layout of `rules` for a config's `shape`.

    Raises:
        LayoutError: two rules make the same native tensor, or use elements of a leaf twice or not at all.
    """
    native: dict[str, NativeTensor] = {}
    leaves: dict[str, LeafTensor] = {}
    used: Counter[str] = Counter()
    stacked: set[str] = set()
    scope = Scope(shape.sizes, {"layer": len(shape.layers), "expert": shape.experts}, {})
    for rule in rules:
        tensors = list(_indices(rule, shape)) if _holds(rule.when, shape.flags) else []
        if not tensors:  # a view of no tensor may have no sizes either, as of experts where no layer has them
            continue
        # Layers of one kind differ in names alone: the view is made once, with the axes of layers left open.
        pattern = rule.value.view(scope)
        counts: Counter[str] = Counter()
        for piece in pattern.pieces:
            counts[piece.leaf] += piece.numel
        made_of = list(_leaf_templates(rule, scope))
        is_stacked = rule.stacked or any("expert" in fields(node.template) for node in rule.value.leaves())
        for indices in tensors:
            name = fill(rule.native, **indices)
            if name in native:
                raise LayoutError(f"two rules of {family} make {name}")
            names = {template: fill(template, **indices) for template in counts}
            native[name] = NativeTensor(name, pattern, tuple(names.values()), rule)
            if is_stacked:
                stacked.add(name)
            for template, leaf in names.items():
                used[leaf] += counts[template]
            for template, node, sizes in made_of:
                leaf = names.get(template) or fill(template, **indices)
                encoding = encoding_of(node.template, leaf) if encoding_of else None
                leaves[leaf] = LeafTensor(leaf, sizes, node.keep_dtype, encoding)
    for tensor in leaves.values():
        if used[tensor.name] != tensor.numel:
            raise LayoutError(
                f"{family}: the rules use {used[tensor.name]} of {tensor.numel} elements of {tensor.name}"
            )
    return Layout(family, native, leaves, stacked=frozenset(stacked), layers=shape.layers, **extra)  # type: ignore[arg-type]


def identity(tensors: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of an architecture that has no native form: every name and shape as it is."""
    return Layout(
        "identity", _unchanged(tensors), {name: LeafTensor(name, tuple(shape)) for name, shape in tensors.items()}
    )


def _unchanged(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NativeTensor]:
    """Tensors that are the same on both sides."""
    patterns = {shape: algebra.leaf("{name}", shape) for shape in set(shapes.values())}
    return {name: NativeTensor(name, patterns[shape], (name,)) for name, shape in shapes.items()}


def _holds(condition: str | None, flags: frozenset[str]) -> bool:
    if condition is None:
        return True
    return all((part[1:] not in flags) if part.startswith("!") else part in flags for part in condition.split("&"))


def _indices(rule: Rule, shape: Shape) -> Iterator[dict[str, int]]:
    """The axes of each tensor that a rule makes: one for each layer that has it, or a single one without axes."""
    if not {"layer", "predict", "nth"} & set(fields(rule.native)):
        yield {}
        return
    own_layers = sum("predict" not in kind.split("+") for kind in shape.layers)
    seen: Counter[str] = Counter()
    for index, kind in enumerate(shape.layers):
        if rule.layers is None or rule.layers in kind.split("+"):
            yield {"layer": index, "predict": index - own_layers, "nth": seen[kind]}
        seen[kind] += 1


def _leaf_templates(rule: Rule, scope: Scope) -> Iterator[tuple[str, Leaf, tuple[int, ...]]]:
    """(template with experts filled in, node, shape) of each leaf that a rule's tensors are made of."""
    for node in rule.value.leaves():
        sizes = tuple(scope.size(s) for s in node.sizes)
        if "expert" in fields(node.template):
            yield from ((fill(node.template, expert=e), node, sizes) for e in range(scope.axes["expert"]))
        else:
            yield node.template, node, sizes
