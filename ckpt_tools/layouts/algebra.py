"""Index bijections between leaves and a view of them, and the boxes that they cut into.

A view is a set of pieces; a piece is a nest of loops that walks a leaf and the view at the same time. Stacking,
concatenating, permuting, flattening and unflattening only rewrite loops, so a view is exact at any size and no
tensor is allocated. Reading a view forward fills it from its leaves; reading the same pieces backward fills the
leaves from it: there is no second direction to write.

Vocabulary: `dim` is a dimension of the view; a stride is counted in elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

from ckpt_tools.core.errors import LayoutError
from ckpt_tools.core.tensors import row_major


class Loop(NamedTuple):
    """One loop of a copy.

    Attributes:
        size: number of steps.
        leaf_stride: elements of the leaf from one step to the next.
        dim: the view's dimension along which it walks.
        step: indices of `dim` from one step to the next.
    """

    size: int
    leaf_stride: int
    dim: int
    step: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The elements of one leaf that a view takes, and where it puts them.

    Attributes:
        leaf: name of the leaf.
        leaf_start: position in the leaf, in elements, of the first element.
        starts: index in the view of the first element, one number per dimension.
        loops: each element is `leaf_start + sum(i * leaf_stride)` and, along each dim, `starts + sum(i * step)`.
    """

    leaf: str
    leaf_start: int
    starts: tuple[int, ...]
    loops: tuple[Loop, ...]

    @property
    def numel(self) -> int:
        return prod(loop.size for loop in self.loops)


@dataclass(frozen=True)
class View:
    """A tensor of `shape` made of pieces of leaves; every element comes from exactly one piece."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """The leaves that it is made of, in the order of their first pieces."""
        return tuple(dict.fromkeys(piece.leaf for piece in self.pieces))


def leaf(name: str, shape: Sequence[int]) -> View:
    """A whole Hugging Face tensor."""
    shape = tuple(shape)
    loops = tuple(Loop(n, stride, dim, 1) for dim, (n, stride) in enumerate(zip(shape, row_major(shape), strict=True)))
    return View(shape, (Piece(name, 0, (0,) * len(shape), loops),))


def permute(view: View, order: Sequence[int]) -> View:
    """Dimension `i` of the result is dimension `order[i]` of the view."""
    if sorted(order) != list(range(len(view.shape))):
        raise LayoutError(f"permute{tuple(order)} does not name each dimension of {view.shape} once")
    new_dim = {old: new for new, old in enumerate(order)}
    return View(
        tuple(view.shape[d] for d in order),
        tuple(
            replace(
                p,
                starts=tuple(p.starts[d] for d in order),
                loops=tuple(loop._replace(dim=new_dim[loop.dim]) for loop in p.loops),
            )
            for p in view.pieces
        ),
    )


def transpose(view: View, a: int = -2, b: int = -1) -> View:
    """The view with two dimensions swapped."""
    order = list(range(len(view.shape)))
    order[a], order[b] = order[b], order[a]
    return permute(view, order)


def stack(views: Sequence[View], dim: int = 0) -> View:
    """Equal views side by side along a new dimension `dim`."""
    shape = views[0].shape
    for view in views:
        if view.shape != shape:
            raise LayoutError(f"stack needs equal shapes: {shape} and {view.shape}")
    pieces = [
        replace(
            p,
            starts=p.starts[:dim] + (index,) + p.starts[dim:],
            loops=tuple(loop._replace(dim=loop.dim + (loop.dim >= dim)) for loop in p.loops),
        )
        for index, view in enumerate(views)
        for p in view.pieces
    ]
    return View(shape[:dim] + (len(views),) + shape[dim:], tuple(pieces))


def concat(views: Sequence[View], dim: int = 0) -> View:
    """Views one after the other along `dim`; their other dimensions are equal."""
    first = views[0].shape
    pieces: list[Piece] = []
    at = 0
    for view in views:
        if view.shape[:dim] + view.shape[dim + 1 :] != first[:dim] + first[dim + 1 :]:
            raise LayoutError(f"concat along dim {dim} needs equal other dimensions: {first} and {view.shape}")
        pieces += [replace(p, starts=_put(p.starts, dim, p.starts[dim] + at)) for p in view.pieces]
        at += view.shape[dim]
    return View(_put(first, dim, at), tuple(pieces))


def flatten(view: View, dim: int) -> View:
    """Dimensions `dim` and `dim + 1` merged into one."""
    inner = view.shape[dim + 1]
    pieces = [
        replace(
            p,
            starts=p.starts[:dim] + (p.starts[dim] * inner + p.starts[dim + 1],) + p.starts[dim + 2 :],
            loops=tuple(
                loop._replace(
                    dim=loop.dim - (loop.dim > dim),
                    step=loop.step * inner if loop.dim == dim else loop.step,
                )
                for loop in p.loops
            ),
        )
        for p in view.pieces
    ]
    return View(view.shape[:dim] + (view.shape[dim] * inner,) + view.shape[dim + 2 :], tuple(pieces))


def unflatten(view: View, dim: int, sizes: tuple[int, int]) -> View:
    """Dimension `dim` split into two of the given sizes.

    Raises:
        LayoutError: the sizes do not multiply to the dimension, or a loop straddles the split.
    """
    outer, inner = sizes
    if outer * inner != view.shape[dim]:
        raise LayoutError(f"dimension {dim} of {view.shape} cannot be split into {outer} x {inner}")
    shape = view.shape[:dim] + (outer, inner) + view.shape[dim + 1 :]
    return View(shape, tuple(_unflatten_piece(p, dim, inner) for p in view.pieces))


def _unflatten_piece(piece: Piece, dim: int, inner: int) -> Piece:
    quotient, remainder = divmod(piece.starts[dim], inner)
    loops: list[Loop] = []
    reach = remainder
    for loop in piece.loops:
        if loop.dim != dim:
            loops.append(loop._replace(dim=loop.dim + (loop.dim > dim)))
        elif loop.step % inner == 0:
            loops.append(loop._replace(step=loop.step // inner))
        elif loop.size * loop.step <= inner:
            loops.append(loop._replace(dim=dim + 1))
            reach += (loop.size - 1) * loop.step
        elif inner % loop.step == 0 and loop.size % (inner // loop.step) == 0:
            count = inner // loop.step
            loops.append(Loop(loop.size // count, loop.leaf_stride * count, dim, 1))
            loops.append(Loop(count, loop.leaf_stride, dim + 1, loop.step))
            reach += (count - 1) * loop.step
        else:
            raise LayoutError(f"a run of {loop.size} steps of {loop.step} in {piece.leaf} straddles blocks of {inner}")
    if reach >= inner:
        raise LayoutError(f"{piece.leaf} starts at {remainder} inside a block of {inner} and straddles its end")
    starts = piece.starts[:dim] + (quotient, remainder) + piece.starts[dim + 1 :]
    return replace(piece, starts=starts, loops=tuple(loops))


def narrow(view: View, dim: int, start: int, length: int) -> View:
    """Indices `start` to `start + length` of dimension `dim`."""
    if not 0 <= start <= start + length <= view.shape[dim]:
        raise LayoutError(f"narrow({dim}, {start}, {length}) is outside {view.shape}")
    offsets = _put((0,) * len(view.shape), dim, start)
    shape = _put(view.shape, dim, length)
    return View(shape, tuple(q for p in view.pieces for q in restrict(p, offsets, shape)))


def restrict(piece: Piece, offsets: Sequence[int], sizes: Sequence[int]) -> list[Piece]:
    """The parts of a piece inside a box of the view, with starts relative to the box.

    Args:
        piece: any piece of a view.
        offsets: first index of the box along each dimension.
        sizes: extent of the box along each dimension.
    """
    pieces = [piece]
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        pieces = [
            _select(p, box)
            for p in pieces
            for box in cut(
                p.starts[dim],
                [loop.size for loop in p.loops],
                [loop.step if loop.dim == dim else 0 for loop in p.loops],
                offset,
                offset + size,
            )
        ]
    return [replace(p, starts=tuple(s - o for s, o in zip(p.starts, offsets, strict=True))) for p in pieces]


def _select(piece: Piece, box: Box) -> Piece:
    starts = list(piece.starts)
    leaf_start = piece.leaf_start
    loops = []
    for loop, (first, count) in zip(piece.loops, box, strict=True):
        starts[loop.dim] += first * loop.step
        leaf_start += first * loop.leaf_stride
        loops.append(loop._replace(size=count))
    return Piece(piece.leaf, leaf_start, tuple(starts), tuple(loops))


Box = tuple[tuple[int, int], ...]
"""A range (first step, number of steps) of each loop of a nest."""


def cut(base: int, sizes: Sequence[int], strides: Sequence[int], low: int, high: int) -> list[Box]:
    """Boxes of a loop nest whose addresses `base + sum(i * stride)` lie in `[low, high)`.

    The boxes are disjoint and together hold exactly those steps. A nest inside the range comes back whole.
    Loops of stride 0 do not move the address and are kept whole. Strides are not negative.
    """
    whole = tuple((0, n) for n in sizes)
    if 0 in sizes:
        return []
    order = sorted((i for i, s in enumerate(strides) if s), key=lambda i: -strides[i])
    span = sum((sizes[i] - 1) * strides[i] for i in order)
    if low <= base and base + span < high:
        return [whole]
    return list(_cut(base, sizes, strides, low, high, order, span, whole))


def _cut(
    base: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    low: int,
    high: int,
    order: Sequence[int],
    span: int,
    box: Box,
) -> Iterator[Box]:
    if base >= high or base + span < low:
        return
    if low <= base and base + span < high:
        yield box
        return
    loop, rest = order[0], order[1:]
    size, stride = sizes[loop], strides[loop]
    inner = span - (size - 1) * stride
    # Step i covers addresses [base + i * stride, base + i * stride + inner].
    touched = max(0, -((base + inner - low) // stride)), min(size - 1, (high - 1 - base) // stride)
    inside = max(0, -((base - low) // stride)), min(size - 1, (high - 1 - inner - base) // stride)
    if inside[0] > inside[1]:
        inside = touched[1] + 1, touched[1]
    for i in range(touched[0], min(inside[0], touched[1] + 1)):
        yield from _cut(base + i * stride, sizes, strides, low, high, rest, inner, _put(box, loop, (i, 1)))
    if inside[0] <= inside[1]:
        yield _put(box, loop, (inside[0], inside[1] - inside[0] + 1))
        for i in range(inside[1] + 1, touched[1] + 1):
            yield from _cut(base + i * stride, sizes, strides, low, high, rest, inner, _put(box, loop, (i, 1)))


def _put(values: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
    return values[:index] + (value,) + values[index + 1 :]
