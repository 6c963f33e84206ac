"""What a naming dialect is: how another trainer names and arranges the same leaves that a family is published with.

A dialect is another set of rules for the native side of a family's layout, made out of the family's own: sizes, kinds
of layers and conditions are the family's, names and arrangement the trainer's. Copying, proving, comparing and
explaining then work on its checkpoints as they do on ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ckpt_tools.core.names import fields, match
from ckpt_tools.layouts.rules import Deinterleave, Leaf, Node, Rule, Stack

Respell = Callable[[Rule], Iterable[Rule]]
"""One rule of a family -> the rules of what a trainer stores of the same leaves."""


@dataclass(frozen=True)
class Dialect:
    """The names of one trainer, for the families that it knows.

    Attributes:
        name: the name on the command line.
        title: whose names they are, for people.
        families: by name of the family, how each of its rules is respelled.
        tied: stored names that may lie beside the name whose weights they share, where the config ties them; empty
            where both are as published.
        lent: templates of leaves that are not stored, with the leaf whose values they have.
        dropped: templates of stored names that have no place in a repository, with the reason; only where no rule has
            the name.
        optional_layers: templates of the names in optional layers, where they are not the family's.
    """

    name: str
    title: str
    families: Mapping[str, Respell]
    tied: Mapping[str, str] = field(default_factory=dict)
    lent: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    optional_layers: Mapping[str, str] = field(default_factory=dict)

    def rules_of(self, family: str, rules: Iterable[Rule]) -> tuple[Rule, ...] | None:
        """The rules of this dialect made out of those of a family, None where the trainer does not know the family."""
        respell = self.families.get(family)
        if respell is None:
            return None
        # A leaf that feeds several native tensors would come more than once.
        found = {(made.native, made.when, made.layers): made for rule in rules for made in respell(rule)}
        return tuple(found.values())

    def unsaid(self, rules: Iterable[Rule], own: Iterable[Rule]) -> tuple[Rule, ...]:
        """The leaves of a family's rules that none of this dialect's `own` rules has, each as a rule."""
        said = {leaf.template for rule in own for leaf in rule.value.leaves()}
        return tuple(
            respelled(rule, leaf.template, Stack(leaf, "expert") if is_over_experts(rule) else leaf)
            for rule in rules
            for leaf in rule.value.leaves()
            if leaf.template not in said
        )

    def lender(self, leaf: str) -> str | None:
        """The leaf whose values one that is not stored has, None where there is none."""
        return next((lender for template, lender in self.lent.items() if match(template, leaf)), None)


def is_over_experts(rule: Rule) -> bool:
    """Whether a native tensor stacks leaves that repositories have one by one for each expert."""
    return any("expert" in fields(leaf.template) for leaf in rule.value.leaves())


def leaf_by_leaf(rule: Rule, name: Callable[[str], str]) -> Iterator[Rule]:
    """The leaves of a rule as they are, each stored under the name that is given for its template."""
    for leaf in rule.value.leaves():
        yield respelled(rule, name(leaf.template), leaf)


def respelled(rule: Rule, name: str, value: Node) -> Rule:
    """What is stored as `name` wherever `rule` holds."""
    return replace(rule, native=name, value=value)


def only_leaf(rule: Rule) -> Leaf:
    """The leaf of a rule that has one."""
    (leaf,) = rule.value.leaves()
    return leaf


def interleaved(value: Node) -> Node:
    """A native value with gate and up alternating where the family's leaves have them so."""
    return value.of if isinstance(value, Deinterleave) else value
