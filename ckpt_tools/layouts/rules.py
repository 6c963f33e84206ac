"""The tree that a family's layout is written in: one rule for each native tensor.

A rule says what a native tensor is made of, in terms of leaves (tensors of the Hugging Face repository). Names are
templates over axes such as `{layer}` and `{expert}`; sizes are names that the family's `Shape` gives numbers to.

    Rule("model.layers.{layer}.mlp.experts.down_proj",
         Stack(Leaf("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", "hidden", "expert_width"), "expert"))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckpt_tools.core.errors import LayoutError
from ckpt_tools.core.names import fill
from ckpt_tools.layouts import algebra
from ckpt_tools.layouts.algebra import View


@dataclass(frozen=True)
class Scope:
    """What a rule is resolved against: the numbers behind size names, and the indices of the axes so far."""

    sizes: Mapping[str, int]
    axes: Mapping[str, int]
    indices: Mapping[str, int]

    def size(self, name: str | int) -> int:
        return name if isinstance(name, int) else self.sizes[name]

    def at(self, axis: str, index: int) -> Scope:
        return Scope(self.sizes, self.axes, {**self.indices, axis: index})


class Node:
    """An expression over leaves; every node builds a view and names its parts."""

    def view(self, scope: Scope) -> View:
        raise NotImplementedError

    def leaves(self) -> Iterator[Leaf]:
        raise NotImplementedError

    def describe(self) -> str:
        """The node as text for `ckpt explain` and the documentation."""
        raise NotImplementedError


class Leaf(Node):
    """A tensor of the Hugging Face repository.

    Args:
        template: its name, for example `model.layers.{layer}.mlp.gate.weight`.
        sizes: its dimensions, names of sizes or numbers.
        keep_dtype: the tensor keeps its dtype under `--dtype` (FP32 state).
    """

    def __init__(self, template: str, *sizes: str | int, keep_dtype: bool = False) -> None:
        self.template = template
        self.sizes = sizes
        self.keep_dtype = keep_dtype

    def view(self, scope: Scope) -> View:
        return algebra.leaf(fill(self.template, **scope.indices), [scope.size(s) for s in self.sizes])

    def leaves(self) -> Iterator[Leaf]:
        yield self

    def describe(self) -> str:
        return f"{self.template} [{', '.join(map(str, self.sizes))}]"


@dataclass(frozen=True)
class Stack(Node):
    """One view for each index of an axis, along a new dimension."""

    of: Node
    over: str
    dim: int = 0

    def view(self, scope: Scope) -> View:
        views = [self.of.view(scope.at(self.over, i)) for i in range(scope.axes[self.over])]
        return algebra.stack(views, self.dim)

    def leaves(self) -> Iterator[Leaf]:
        return self.of.leaves()

    def describe(self) -> str:
        return f"stack over {self.over} along dim {self.dim}: {self.of.describe()}"


class _Parts(Node):
    def __init__(self, *parts: Node, dim: int = 0) -> None:
        self.parts = parts
        self.dim = dim

    def leaves(self) -> Iterator[Leaf]:
        for part in self.parts:
            yield from part.leaves()

    def _described(self, verb: str) -> str:
        return f"{verb} along dim {self.dim}: ({', '.join(part.describe() for part in self.parts)})"


class Concat(_Parts):
    """Parts one after the other along a dimension."""

    def view(self, scope: Scope) -> View:
        return algebra.concat([part.view(scope) for part in self.parts], self.dim)

    def describe(self) -> str:
        return self._described("concat")


class Join(_Parts):
    """Equal parts side by side along a new dimension."""

    def view(self, scope: Scope) -> View:
        return algebra.stack([part.view(scope) for part in self.parts], self.dim)

    def describe(self) -> str:
        return self._described("join")


@dataclass(frozen=True)
class _Unary(Node):
    of: Node

    def leaves(self) -> Iterator[Leaf]:
        return self.of.leaves()


@dataclass(frozen=True)
class Permute(_Unary):
    """Dimensions in another order."""

    order: tuple[int, ...]

    def view(self, scope: Scope) -> View:
        return algebra.permute(self.of.view(scope), self.order)

    def describe(self) -> str:
        return f"permute {self.order} of {self.of.describe()}"


@dataclass(frozen=True)
class Transpose(_Unary):
    """The last two dimensions swapped."""

    def view(self, scope: Scope) -> View:
        return algebra.transpose(self.of.view(scope))

    def describe(self) -> str:
        return f"transpose of {self.of.describe()}"


@dataclass(frozen=True)
class Flatten(_Unary):
    """Dimensions `dim` and `dim + 1` merged."""

    dim: int

    def view(self, scope: Scope) -> View:
        return algebra.flatten(self.of.view(scope), self.dim)

    def describe(self) -> str:
        return f"flatten dims {self.dim}, {self.dim + 1} of ({self.of.describe()})"


@dataclass(frozen=True)
class Unflatten(_Unary):
    """Dimension `dim` split in two."""

    dim: int
    sizes: tuple[str | int, str | int]

    def view(self, scope: Scope) -> View:
        outer, inner = (scope.size(s) for s in self.sizes)
        return algebra.unflatten(self.of.view(scope), self.dim, (outer, inner))

    def describe(self) -> str:
        return f"{self.of.describe()} as [{self.sizes[0]} x {self.sizes[1]}] along dim {self.dim}"


@dataclass(frozen=True)
class Split(_Unary):
    """Part `index` of `count` equal parts of a dimension: one leaf feeds several native tensors."""

    index: int
    count: int
    dim: int = 0

    def view(self, scope: Scope) -> View:
        whole = self.of.view(scope)
        size, rest = divmod(whole.shape[self.dim], self.count)
        if rest:
            raise LayoutError(f"dimension {self.dim} of {whole.shape} does not split into {self.count} equal parts")
        return algebra.narrow(whole, self.dim, self.index * size, size)

    def describe(self) -> str:
        return f"part {self.index + 1} of {self.count} along dim {self.dim} of {self.of.describe()}"


@dataclass(frozen=True)
class Slice(_Unary):
    """`size` indices of dimension 0 from `start` on, where its parts are not equal."""

    start: str | int
    size: str | int

    def view(self, scope: Scope) -> View:
        return algebra.narrow(self.of.view(scope), 0, scope.size(self.start), scope.size(self.size))

    def describe(self) -> str:
        return f"{self.size} rows from {self.start} on of {self.of.describe()}"


@dataclass(frozen=True)
class Grouped(Node):
    """Fused QKV: for each KV head, its query heads, then its key head, then its value head.

    `[kv_heads * (queries_per_kv_head + 2) * head_dim, ...]`, so that `Shard(0)` keeps whole groups together. Where
    attention has an output gate, `query` holds for each head its query and then its gate; the native tensor has the
    gates of a group's heads between their queries and their key: `queries_per_kv_head` more rows of `head_dim`.
    """

    query: Leaf
    key: Leaf
    value: Leaf
    gated: bool = False

    def view(self, scope: Scope) -> View:
        kv_heads, head_dim = scope.size("kv_heads"), scope.size("head_dim")

        def groups(node: Leaf, heads: int) -> View:
            by_head = algebra.unflatten(node.view(scope), 0, (kv_heads * heads, head_dim))
            return algebra.unflatten(by_head, 0, (kv_heads, heads))

        queries = scope.size("query_heads") // kv_heads
        query = groups(self.query, queries * (2 if self.gated else 1))
        if self.gated:
            pairs = algebra.unflatten(query, 1, (queries, 2))
            query = algebra.flatten(algebra.permute(pairs, [0, 2, 1, *range(3, len(pairs.shape))]), 1)
        grouped = algebra.concat([query, groups(self.key, 1), groups(self.value, 1)], 1)
        return algebra.flatten(algebra.flatten(grouped, 0), 0)

    def leaves(self) -> Iterator[Leaf]:
        yield from (self.query, self.key, self.value)

    def describe(self) -> str:
        parts = ", ".join(node.describe() for node in (self.query, self.key, self.value))
        heads = "query heads, their gates, key and value heads" if self.gated else "query, key and value heads"
        return f"for each KV head, its {heads} along dim 0: ({parts})"


@dataclass(frozen=True)
class Deinterleave(_Unary):
    """Even indices of a dimension, then its odd ones: gate and up rows apart where they alternate on disk."""

    dim: int

    def view(self, scope: Scope) -> View:
        whole = self.of.view(scope)
        pairs = algebra.unflatten(whole, self.dim, (whole.shape[self.dim] // 2, 2))
        order = list(range(len(pairs.shape)))
        order[self.dim], order[self.dim + 1] = order[self.dim + 1], order[self.dim]
        return algebra.flatten(algebra.permute(pairs, order), self.dim)

    def describe(self) -> str:
        return f"even, then odd indices of dim {self.dim} of ({self.of.describe()})"


@dataclass(frozen=True)
class PairedRope(_Unary):
    """Rows of each head with its two halves alternating, as Meta's rotary embedding pairs them.

    Hugging Face pairs row `i` of a head with row `i + head_dim / 2`, so its conversion of Llama permutes the query and
    key projections (`permute` in transformers' `convert_llama_weights_to_hf.py`); this is the order before.
    """

    heads: str

    def view(self, scope: Scope) -> View:
        half, odd = divmod(scope.size("head_dim"), 2)
        if odd:
            raise LayoutError(f"heads of {scope.size('head_dim')} rows have no halves to rotate")
        by_head = algebra.unflatten(self.of.view(scope), 0, (scope.size(self.heads), 2 * half))
        halves = algebra.unflatten(by_head, 1, (2, half))
        paired = algebra.permute(halves, [0, 2, 1, *range(3, len(halves.shape))])
        return algebra.flatten(algebra.flatten(paired, 0), 0)

    def describe(self) -> str:
        return f"the halves of each head interleaved along dim 0 of {self.of.describe()}"


def interleave(gate: Node, up: Node, dim: int = 0) -> Node:
    """Gate and up alternating along `dim`: index 0 is gate's first, index 1 up's first."""
    return Flatten(Join(gate, up, dim=dim + 1), dim)


@dataclass(frozen=True)
class Rule:
    """How one native tensor (or one for each layer) is made.

    Attributes:
        native: template of its name.
        value: what it is made of.
        when: flags of the family's `Shape` that must be set, joined by `&`; a leading `!` negates one.
        layers: kind of layer that has it, or None for every layer; ignored for names without `{layer}`, the index
            among all layers, `{predict}`, that among the layers that predict further tokens, and `{nth}`, that among
            the layers of the same kind.
        stacked: it is stacked over experts along dimension 0 although no leaf name has an `{expert}`.
    """

    native: str
    value: Node
    when: str | None = None
    layers: str | None = None
    stacked: bool = False


def same(template: str, *sizes: str | int, when: str | None = None, layers: str | None = None) -> Rule:
    """A tensor that has the same name and content on both sides."""
    return Rule(template, Leaf(template, *sizes), when=when, layers=layers)
