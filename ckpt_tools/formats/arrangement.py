"""The order of the tensors of a safetensors file, which has no holes: what lies where follows from it alone.

Blocks can be shared with another file where positions agree modulo a block. Tensors of whole blocks leave that residue
as it is, so those that want the same one go together, and small tensors of other sizes go between groups: they move
the residue from the one wanted before to the one wanted next.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

ALIGNMENT: Final = 4096
STEP: Final = 8
"""Residues and the sizes of tensors that move them are multiples of the widest element, so that all stay aligned."""


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
    """(residue that the data starts at, order of the tensors), with as many bytes as possible where they should be.

    Args:
        sizes: bytes of each tensor.
        widths: bits of an element of each tensor.
        residues: position modulo `ALIGNMENT` that a tensor should have, a multiple of `STEP`; others go anywhere.
    """
    # What would leave the next tensor unaligned comes last, with all that finds no place.
    movable = {name: nbytes for name, nbytes in sizes.items() if nbytes % STEP == 0}
    groups: defaultdict[int, list[str]] = defaultdict(list)
    movers: defaultdict[int, list[str]] = defaultdict(list)
    for name in aligned_order(movable, widths):
        if name in residues:
            groups[residues[name]].append(name)
        elif movable[name] % ALIGNMENT:
            movers[movable[name] % ALIGNMENT].append(name)
    start = at = max(groups, key=lambda residue: sum(sizes[name] for name in groups[residue]), default=0)
    order: list[str] = []
    way: tuple[int, ...] | None = ()
    while groups and way is not None:
        for size in way:
            order.append(movers[size].pop(0))
            at = (at + size) % ALIGNMENT
        group = groups.pop(at)
        count = next((i for i, name in enumerate(group, 1) if sizes[name] % ALIGNMENT), len(group))
        # One of a size that moves the residue ends the group; what is left wants to be reached again.
        order += group[:count]
        if group[count:]:
            groups[at] = group[count:]
        at = (at + sizes[group[count - 1]]) % ALIGNMENT
        way = _way(at, groups, {size: len(names) for size, names in movers.items()})
    placed = set(order)
    rest = {name: nbytes for name, nbytes in sizes.items() if name not in placed}
    return start, order + aligned_order(rest, widths)


def _way(start: int, wanted: Mapping[int, object], movers: Mapping[int, int]) -> tuple[int, ...] | None:
    """Sizes of the fewest movers that lead from a residue to a wanted one; None where there is no way.

    Args:
        start: the residue to begin at.
        wanted: residues to end at.
        movers: how many there are of each size.
    """
    ways: dict[int, tuple[int, ...]] = {start: ()}
    if start in wanted:
        return ()
    queue = [start]
    for residue in queue:
        way = ways[residue]
        for size, count in movers.items():
            reached = (residue + size) % ALIGNMENT
            if reached in ways or way.count(size) >= count:
                continue
            ways[reached] = (*way, size)
            if reached in wanted:
                return ways[reached]
            queue.append(reached)
    return None
