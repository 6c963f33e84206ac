"""Proof, from a plan alone, that every element is written exactly once.

The addresses of a loop nest are the exponents of `x**start * prod((x**(stride*size) - 1) / (x**stride - 1))`. A set of
extents covers `0 .. n-1` exactly once if and only if their polynomials add up to `(x**n - 1) / (x - 1)`. Both are
evaluated at one secret point modulo the prime 2**127 - 1; by Schwartz and Zippel a hole, an overlap or a stray write of
a region of up to 2**40 elements goes unseen with a probability under 2**-86. The cost does not depend on sizes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ckpt_tools.core.errors import LayoutError
from ckpt_tools.core.tensors import Framing, Store, StoredTensor
from ckpt_tools.engine.extents import Extent

PRIME = 2**127 - 1
_POINT = secrets.randbelow(PRIME - 4) + 2


_DIGIT = 12
_powers: list[list[int]] = []


def _power(exponent: int) -> int:
    """`x**exponent`, from tables of the powers of each of its digits in base `2**_DIGIT`; `pow` takes far longer."""
    if exponent < 0:
        return pow(_POINT, exponent, PRIME)
    value, digit = 1, 0
    while exponent:
        if digit == len(_powers):
            base = pow(_POINT, 1 << _DIGIT * digit, PRIME)
            table = [1]
            for _ in range((1 << _DIGIT) - 1):
                table.append(table[-1] * base % PRIME)
            _powers.append(table)
        value = value * _powers[digit][exponent & (1 << _DIGIT) - 1] % PRIME
        exponent >>= _DIGIT
        digit += 1
    return value


@lru_cache(maxsize=4096)
def _loop(stride: int, size: int) -> int:
    """Sum of `x**(i * stride)` for `i` below `size`."""
    step = _power(stride)
    if step == 1:
        return size % PRIME
    return (_power(stride * size) - 1) * pow(step - 1, -1, PRIME) % PRIME


@lru_cache(maxsize=4096)
def _loops(strides: tuple[int, ...], sizes: tuple[int, ...], itemsize: int = 1) -> int:
    """The series of a nest that starts at 0, in bytes of items of `itemsize`; all of an item's bytes are visited."""
    value = _loop(1, itemsize)
    for stride, size in zip(strides, sizes, strict=True):
        value = value * _loop(stride * itemsize, size) % PRIME
    return value


def covers(nests: Iterable[tuple[int, tuple[int, ...], tuple[int, ...]]], count: int) -> bool:
    """Whether loop nests (start, strides, sizes) visit each of `0 .. count-1` exactly once."""
    total = 0
    for start, strides, sizes in nests:
        if start < 0 or start + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) >= count:
            return False
        total += _power(start) * _loops(strides, sizes)
    return total % PRIME == (_loop(1, count) if count else 0)


def _in_a_row(extents: Sequence[Extent], items: int) -> bool:
    """Whether contiguous extents follow each other from the first item to the last: what most leaves are."""
    at = 0
    for part in extents:
        if part.leaf_start != at or part.leaf_strides != (1,):
            return False
        at += part.sizes[0]
    return at == items


def prove_leaf(name: str, extents: Sequence[Extent], items: int, where: str) -> None:
    """Every item of a leaf lies in the store exactly once.

    Args:
        name: of the leaf.
        extents: of it, sorted by their starts in the leaf.
        items: of the leaf.
        where: the store, for the message.

    Raises:
        LayoutError: an item is missing or present twice.
    """
    if not _in_a_row(extents, items) and not covers(((e.leaf_start, e.leaf_strides, e.sizes) for e in extents), items):
        found = sum(e.numel for e in extents)
        raise LayoutError(
            f"{where} does not hold {name} exactly once: its pieces have {found:,} of {items:,} elements",
            hint="a shard is missing, or the sharding is described wrongly",
        )


def prove_chunks(store: Store, extents: Iterable[tuple[Extent, int]]) -> None:
    """Every byte of every chunk of a planned store is written exactly once.

    Args:
        store: the planned store.
        extents: each extent of the plan with its item size in bytes.

    Raises:
        LayoutError: a byte of a chunk would be left unwritten or written twice.
    """
    totals: dict[str, int] = {}
    for part, itemsize in extents:
        value = _power(part.position) * _loops(part.file_strides, part.sizes, itemsize)
        totals[part.file] = (totals.get(part.file, 0) + value) % PRIME
    for tensor in store.tensors.values():
        for position, length, file in chunk_ranges(tensor):
            expected = _power(position) * _loop(1, length) if length else 0
            totals[file] = (totals.get(file, 0) - expected) % PRIME
    for file, rest in totals.items():
        if rest:
            raise LayoutError(f"the plan does not write every tensor byte of {file} exactly once")


def prove_files(store: Store, framing: Iterable[Framing]) -> None:
    """Chunks and framing of each planned file lie inside it and do not overlap.

    Raises:
        LayoutError: they do.
    """
    ranges: dict[str, list[tuple[int, int]]] = {file: [] for file in store.files}
    for tensor in store.tensors.values():
        for position, length, file in chunk_ranges(tensor):
            ranges[file].append((position, position + length))
    for frame in framing:
        ranges[frame.file].append((frame.position, frame.position + len(frame.data)))
    for file, spans in ranges.items():
        at = 0
        for begin, end in sorted(spans):
            if begin < at or end > store.files[file]:
                raise LayoutError(f"the plan of {file} overlaps at byte {begin:,} or leaves its {store.files[file]:,}")
            at = end


def chunk_ranges(tensor: StoredTensor) -> Iterable[tuple[int, int, str]]:
    """(position, length in bytes, file) of each chunk."""
    for chunk in tensor.chunks:
        yield chunk.position, tensor.dtype.nbytes(chunk.numel), chunk.file
