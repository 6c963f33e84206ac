"""The two ends of a leaf's way: where it is stored, plain or encoded, seen as windows of its values.

A window always holds values; an encoded end decodes what it reads and encodes what it writes. Digests are over the
stored bytes of an end, not over decoded values, so they can be checked without knowing how the end was made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import xxhash

from ckpt_tools.core.dtypes import DTYPES, DType
from ckpt_tools.core.scratch import scratch
from ckpt_tools.core.tensors import Store, StoredTensor
from ckpt_tools.engine.cast import cast
from ckpt_tools.engine.extents import Extent, NativeExtents, addressable, leaf_extents
from ckpt_tools.engine.prove import prove_leaf
from ckpt_tools.engine.transfer import Reader, Window, Writer, equal, gather, scatter
from ckpt_tools.layouts.encodings import VALUES, Encoding, Part
from ckpt_tools.layouts.layout import Layout, Side

F32 = DTYPES["F32"]


class Digest:
    """xxh3-128 of what an end stores of one segment: of its bytes, or of the digests of its parts' bytes in order."""

    def __init__(self) -> None:
        self._parts: dict[int, xxhash.xxh3_128] = {}

    def update(self, part: int, data: memoryview) -> None:
        """Adds the next bytes of part number `part` (0 for a plain end)."""
        found = self._parts.get(part)
        if found is None:
            found = self._parts[part] = xxhash.xxh3_128()
        found.update(data)

    def digest(self) -> bytes:
        if not self._parts:
            return xxhash.xxh3_128_digest(b"")
        digests = [self._parts[part].digest() for part in sorted(self._parts)]
        return digests[0] if len(digests) == 1 else xxhash.xxh3_128_digest(b"".join(digests))


@dataclass(frozen=True, slots=True)
class Plain:
    """A leaf stored as it is. Windows of it begin and end at multiples of `read_step` and `write_step`: anywhere.

    Attributes:
        extents: where its items lie, sorted by leaf position.
        dtype: of its items.
        itemsize: bytes of an item (1 for types narrower than a byte, which are moved as bytes).
    """

    extents: tuple[Extent, ...]
    dtype: DType
    itemsize: int

    read_step: ClassVar[int] = 1
    write_step: ClassVar[int] = 1

    def first(self) -> tuple[str, int]:
        """(file, position) where the leaf begins, for ordering reads."""
        return (self.extents[0].file, self.extents[0].position) if self.extents else ("", 0)

    def rows(self) -> int:
        """Items of the longest row that strided extents break the leaf into; 1 when none is strided."""
        return max((e.leaf_strides[0] for e in self.extents if not e.is_contiguous), default=1)

    @property
    def is_transposed(self) -> bool:
        """Whether windows of it are short runs in its files, the shorter the smaller the window."""
        return any(extent.is_transposed for extent in self.extents)

    def fill(self, window: Window, reader: Reader) -> None:
        """Reads the window's values."""
        gather(self.extents, window, reader)

    def drain(self, window: Window, dtype: DType, writer: Writer, digest: Digest, *, check: bool = False) -> bool:  # noqa: ARG002
        """Writes the window's values, given as `dtype`. Returns True: only quantising is checked."""
        data = window.data if dtype is self.dtype else cast(window.data, dtype, self.dtype)
        digest.update(0, data)
        scatter(self.extents, Window(data, window.low, window.high, self.itemsize), writer)
        return True

    def stored(self, low: int, high: int, reader: Reader) -> Iterator[tuple[int, memoryview]]:
        """(part number, stored bytes) of items `[low, high)`."""
        window = Window(memoryview(bytearray((high - low) * self.itemsize)), low, high, self.itemsize)
        self.fill(window, reader)
        yield 0, window.data


@dataclass(frozen=True, slots=True)
class InPlace(Plain):
    """A leaf whose bytes are in place already, and are wanted for their digest only."""

    def drain(self, window: Window, dtype: DType, writer: Writer, digest: Digest, *, check: bool = False) -> bool:  # noqa: ARG002
        """Takes the window's values into the digest; nothing is written."""
        digest.update(0, window.data)
        return True


@dataclass(frozen=True, slots=True)
class Encoded:
    """A leaf stored in a quantised form.

    Attributes:
        encoding: its form.
        shape: of the whole leaf.
        parts: its stored tensors.
        ends: where each of them lies.
        dtype: of the decoded values.
        itemsize: bytes of a decoded value.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    ends: tuple[Plain, ...]
    dtype: DType
    itemsize: int

    @property
    def read_step(self) -> int:
        return self.encoding.decode_step(self.shape)

    @property
    def write_step(self) -> int:
        return self.encoding.encode_step(self.shape)

    @property
    def is_transposed(self) -> bool:
        return False

    def first(self) -> tuple[str, int]:
        """(file, position) where the leaf begins, for ordering reads."""
        return self.ends[0].first()

    def rows(self) -> int:
        return 1

    def fill(self, window: Window, reader: Reader) -> None:
        """Reads and decodes the window's values, at any alignment."""
        step = self.read_step
        low, high = window.low - window.low % step, -(-window.high // step) * step
        stored = tuple(
            data if end.dtype is part.dtype else cast(data, end.dtype, part.dtype)
            for (_, data), end, part in zip(self.stored(low, high, reader), self.ends, self.parts, strict=True)
        )
        aligned = (low, high) == (window.low, window.high)
        values = window.data if aligned else scratch("decoded window", (high - low) * self.itemsize)
        self.encoding.decode(self.shape, low, stored, self.dtype, values)
        if not aligned:
            begin = (window.low - low) * self.itemsize
            window.data[:] = values[begin : begin + len(window.data)]

    def drain(self, window: Window, dtype: DType, writer: Writer, digest: Digest, *, check: bool = False) -> bool:
        """Encodes the window's values, given as `dtype`, and writes them; the window is aligned to `write_step`.

        Returns:
            whether they read back as they were to the last bit; True where `check` does not ask for it.
        """
        values = window.data
        if dtype is not VALUES and dtype is not F32:
            values, dtype = cast(values, dtype, F32), F32
        ranges = self.encoding.ranges(self.shape, window.low, window.high)
        encoded = tuple(
            scratch(f"part {number}", (high - low) * end.itemsize)
            for number, (end, (low, high)) in enumerate(zip(self.ends, ranges, strict=True))
        )
        self.encoding.encode(self.shape, values, dtype, encoded)
        for number, (end, (low, high), data) in enumerate(zip(self.ends, ranges, encoded, strict=True)):
            digest.update(number, data)
            scatter(end.extents, Window(data, low, high, end.itemsize), writer)
        if not check:
            return True
        again = scratch("decoded window", len(values))
        self.encoding.decode(self.shape, window.low, encoded, dtype, again)
        return equal(again, values)

    def stored(self, low: int, high: int, reader: Reader) -> Iterator[tuple[int, memoryview]]:
        """(part number, stored bytes) that items `[low, high)`, aligned to `read_step`, depend on.

        The bytes are valid until this thread asks for others.
        """
        for number, (end, (first, last)) in enumerate(
            zip(self.ends, self.encoding.ranges(self.shape, low, high), strict=True)
        ):
            window = Window(scratch(f"part {number}", (last - first) * end.itemsize), first, last, end.itemsize)
            end.fill(window, reader)
            yield number, window.data


End = Plain | Encoded


def decoded_as(end: End, dtype: DType) -> End:
    """An end that gives its values as `dtype`, if it decodes them and can: F32 then keeps more than BF16 would."""
    if isinstance(end, Encoded) and dtype is F32:
        return replace(end, dtype=F32, itemsize=F32.itemsize)
    return end


def plains(end: End) -> tuple[Plain, ...]:
    """The stored tensors of an end."""
    return (end,) if isinstance(end, Plain) else end.ends


def plain(tensor: StoredTensor, extents: list[Extent]) -> Plain:
    """A leaf that lies in the given extents, with the dtype of a stored tensor."""
    itemsize, _ = addressable(tensor.dtype, 0)
    return Plain(tuple(sorted(extents, key=lambda e: e.leaf_start)), tensor.dtype, itemsize)


def repository_end(name: str, layout: Layout, tensors: Mapping[str, StoredTensor]) -> End:
    """Where a leaf lies in a store that has Hugging Face names."""
    leaf, parts = layout.leaves[name], layout.parts.get(name)
    if leaf.encoding is None or parts is None:
        tensor = tensors[name]
        return plain(tensor, leaf_extents(tensor))
    ends = tuple(plain(tensors[part.name], leaf_extents(tensors[part.name])) for part in parts)
    return Encoded(leaf.encoding, leaf.shape, parts, ends, VALUES, VALUES.itemsize)


def leaf_ends(store: Store, layout: Layout, side: Side, leaves: Collection[str] | None = None) -> dict[str, End]:
    """Where each leaf lies in a store.

    Args:
        store: an opened or planned checkpoint.
        layout: of its family.
        side: side of the layout that the store's names are.
        leaves: the leaves wanted; None takes all.
    """
    if side == "hf" or layout.is_identity:
        wanted = layout.leaves if leaves is None else leaves
        return {name: repository_end(name, layout, store.tensors) for name in wanted}
    found: dict[str, list[Extent]] = {}
    owners: dict[str, StoredTensor] = {}
    extents = NativeExtents()
    for name, tensor in store.tensors.items():
        native = layout.native[name]
        if leaves is not None and not any(leaf in leaves for leaf in native.leaves):
            continue
        for leaf in native.leaves:
            found.setdefault(leaf, [])
            owners[leaf] = tensor
        for leaf, part in extents.of(tensor, native):
            found[leaf].append(part)
    return {leaf: plain(owners[leaf], parts) for leaf, parts in found.items() if leaves is None or leaf in leaves}


def prove_end(name: str, end: End, items: int, where: str) -> None:
    """Every item of a leaf, or of each of its parts, is stored exactly once.

    Raises:
        LayoutError: an item is missing or stored twice.
    """
    if isinstance(end, Plain):
        prove_leaf(name, end.extents, items, where)
        return
    for part, stored in zip(end.parts, end.ends, strict=True):
        prove_leaf(part.name, stored.extents, part.items, where)
