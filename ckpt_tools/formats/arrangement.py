"""The order of the tensors of safetensors files, which have no holes: what lies where follows from it alone.

Blocks can be shared with another file where positions agree modulo a block. Tensors of whole blocks leave that residue
as it is, so those that want the same one go together, and small tensors of other sizes go between groups: they move
the residue from the one wanted before to the one wanted next. Where they cannot, another file begins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import gcd
from typing import Final

ALIGNMENT: Final = 4096
STEP: Final = 8
"""Residues and the sizes of tensors that move them are multiples of the widest element, so that all stay aligned."""
FEWEST: Final = 64
"""A group gets files of its own where it has at least this part of all bytes."""


def aligned_order(sizes: Mapping[str, int], widths: Mapping[str, int]) -> list[str]:
    """Tensors of whole blocks first, so that each starts on a block; then the others, widest elements first.

    Args:
        sizes: bytes of each tensor.
        widths: bits of an element of each tensor; each then starts on a multiple of it, as torch needs for a view.
    """
    whole = [name for name, nbytes in sizes.items() if nbytes % ALIGNMENT == 0]
    odd = sorted((name for name, nbytes in sizes.items() if nbytes % ALIGNMENT), key=lambda name: -widths[name])
    return [*whole, *odd]


def congruent_order(
    sizes: Mapping[str, int], widths: Mapping[str, int], residues: Mapping[str, int]
) -> tuple[int, list[str]]:
    """(residue that the data starts at, order of the tensors), with most bytes where they should be.

    Args:
        sizes: bytes of each tensor.
        widths: bits of an element of each tensor.
        residues: position modulo `ALIGNMENT` that a tensor should have, a multiple of `STEP`; others go anywhere.
    """
    # What would leave the next tensor unaligned comes last, with all that finds no place.
    movable = aligned_order({name: nbytes for name, nbytes in sizes.items() if nbytes % STEP == 0}, widths)
    weights: defaultdict[int, int] = defaultdict(int)
    for name in movable:
        if name in residues:
            weights[residues[name]] += sizes[name]
    if not weights:
        return 0, aligned_order(sizes, widths)
    # The tensors that the source begins with lead to the others as they did there; the heaviest ones are worth a try.
    starts = dict.fromkeys((next(iter(weights)), max(weights, key=lambda residue: weights[residue])))
    found = {start: _from(start, movable, sizes, residues) for start in starts}
    start = max(found, key=lambda start: found[start][0])
    order = found[start][1]
    placed = set(order)
    rest = {name: nbytes for name, nbytes in sizes.items() if name not in placed}
    return start, order + aligned_order(rest, widths)


def _from(
    start: int, names: Iterable[str], sizes: Mapping[str, int], residues: Mapping[str, int]
) -> tuple[int, list[str]]:
    """(bytes that lie where they should, order of them and of what lies between) for data that starts at a residue."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    movers: defaultdict[int, list[str]] = defaultdict(list)
    for name in names:
        if name in residues:
            groups[residues[name]].append(name)
        elif sizes[name] % ALIGNMENT:
            movers[sizes[name] % ALIGNMENT].append(name)
    left = {residue: sum(sizes[name] for name in group) for residue, group in groups.items()}
    order: list[str] = []
    at, good = start, 0
    way: tuple[int, ...] | None = ()
    while groups and way is not None:
        for size in way:
            order.append(movers[size].pop(0))
            at = (at + size) % ALIGNMENT
        group = groups.pop(at)
        count = next((i for i, name in enumerate(group, 1) if sizes[name] % ALIGNMENT), len(group))
        # One of a size that moves the residue ends the group; what is left wants to be reached again.
        order += group[:count]
        placed = sum(sizes[name] for name in group[:count])
        good, left[at] = good + placed, left[at] - placed
        if group[count:]:
            groups[at] = group[count:]
        else:
            del left[at]
        at = (at + sizes[group[count - 1]]) % ALIGNMENT
        way = _way(at, left, {size: len(names) for size, names in movers.items()})
    return good, order


def congruent_files(sizes: Mapping[str, int], residues: Mapping[str, int]) -> list[list[str]]:
    """Names in groups that should not share a file: no order of one file gives residues of two groups.

    Args:
        sizes: bytes of each tensor.
        residues: position modulo `ALIGNMENT` that a tensor should have.
    """
    apart = gcd(ALIGNMENT, *(n for name, n in sizes.items() if name not in residues and n % STEP == 0))
    weights: defaultdict[int, int] = defaultdict(int)
    for name, residue in residues.items():
        weights[residue % apart] += sizes[name]
    groups: defaultdict[int, list[str]] = defaultdict(list)
    current = max(weights, key=lambda kind: weights[kind], default=0)
    for name in sizes:
        kind = residues.get(name, current) % apart
        # A file for a few tensors would cost readers more than sharing them saves.
        if FEWEST * weights[kind] >= sum(weights.values()):
            current = kind
        groups[current].append(name)
    return list(groups.values())


def _way(start: int, wanted: Mapping[int, int], movers: Mapping[int, int]) -> tuple[int, ...] | None:
    """Sizes of the fewest movers that lead from a residue to a wanted one; None where there is no way.

    Args:
        start: the residue to begin at.
        wanted: bytes by residue to end at; of those that are equally near the one with most is taken.
        movers: how many there are of each size.
    """
    ways: dict[int, tuple[int, ...]] = {start: ()}
    level = [start]
    while level:
        if hits := [residue for residue in level if residue in wanted]:
            return ways[max(hits, key=lambda residue: wanted[residue])]
        reached: dict[int, tuple[int, ...]] = {}
        for residue in level:
            for size, count in movers.items():
                if ways[residue].count(size) < count:
                    reached.setdefault((residue + size) % ALIGNMENT, (*ways[residue], size))
        level = [residue for residue in reached if residue not in ways]
        ways = {**reached, **ways}
    return None
