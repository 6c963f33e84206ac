"""Looks at checkpoints without touching tensor data: summaries, differences by name, and explanations of one tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckpt_tools.core.errors import LayoutError
from ckpt_tools.core.names import nearest
from ckpt_tools.core.tensors import Store
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.layouts.layout import Layout

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors whose names differ only in their indices.

    Attributes:
        pattern: the name with each index as `*`.
        count: how many there are.
        dtypes: their dtypes, joined by `/`.
        shape: their common shape, or the first one with `...` when they differ.
        nbytes: their bytes together.
    """

    pattern: str
    count: int
    dtypes: str
    shape: str
    nbytes: int


def group_tensors(store: Store) -> list[TensorGroup]:
    """The tensors of a store grouped by the pattern of their names, in the order of first appearance."""
    groups: dict[str, list[str]] = {}
    for name in store.tensors:
        groups.setdefault(_INDEX.sub("*", name), []).append(name)
    result = []
    for pattern, names in groups.items():
        tensors = [store.tensors[name] for name in names]
        shapes = {t.shape for t in tensors}
        shape = str(list(tensors[0].shape)) + ("" if len(shapes) == 1 else " ...")
        dtypes = "/".join(sorted({t.dtype.name for t in tensors}))
        result.append(TensorGroup(pattern, len(names), dtypes, shape, sum(t.nbytes for t in tensors)))
    return result


@dataclass(frozen=True)
class Difference:
    """One leaf that two checkpoints describe differently; `left` or `right` is None where it is absent."""

    name: str
    left: str | None
    right: str | None


def differences(left: Checkpoint, right: Checkpoint) -> list[Difference]:
    """Leaves that are absent from one side, or of another shape or dtype. Values are not read."""

    def described(checkpoint: Checkpoint) -> dict[str, str]:
        leaves = checkpoint.layout.leaves
        return {n: f"{dtype.name} {list(leaves[n].shape)}" for n, dtype in checkpoint.leaf_dtypes().items()}

    mine, theirs = described(left), described(right)
    return [
        Difference(name, mine.get(name), theirs.get(name))
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]


@dataclass(frozen=True)
class Explanation:
    """What one name is on the other side of the layout.

    Attributes:
        name: the name asked for.
        side: the side that it is a name of: `hf`, `native`, or another trainer's dialect.
        shape: its shape.
        rule: the rule in words.
        counterparts: names on the other side with their shapes.
    """

    name: str
    side: str
    shape: tuple[int, ...]
    rule: str
    counterparts: tuple[tuple[str, tuple[int, ...]], ...]


def explain(layout: Layout, name: str) -> list[Explanation]:
    """How a native name is made, or where a Hugging Face name goes; both when it is a name on both sides.

    Raises:
        LayoutError: the layout has no such name; the message names the nearest.
    """
    found = []
    if name in layout.native:
        tensor = layout.native[name]
        rule = tensor.rule.value.describe() if tensor.rule else "as it is"
        counterparts = tuple((leaf, layout.leaves[leaf].shape) for leaf in tensor.leaves)
        found.append(Explanation(name, layout.dialect, tensor.shape, rule, counterparts))
    if name in layout.lent:
        lender = layout.lent[name]
        rule = f"not stored: the values of {lender}"
        found.append(Explanation(name, "hf", layout.leaves[name].shape, rule, ((lender, layout.leaves[lender].shape),)))
    elif name in layout.leaves:
        users = [t for t in layout.native.values() if name in t.leaves]
        if [t.name for t in users] != [name]:
            rule = "; ".join(f"{t.name}: {t.rule.value.describe()}" if t.rule else "as it is" for t in users)
            counterparts = tuple((t.name, t.shape) for t in users)
            found.append(Explanation(name, "hf", layout.leaves[name].shape, rule, counterparts))
    if not found:
        near = nearest(name, [*layout.native, *layout.leaves])
        raise LayoutError(
            f"a {layout.family} model of this config has no tensor {name}",
            hint=f"did you mean {near}?" if near else "`ckpt inspect` lists the names of a checkpoint",
        )
    return found
