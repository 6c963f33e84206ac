"""One tensor inside a `.distcp` file: a `torch.save` archive, which is a zip file whose entries are stored as they are.

`locate` finds the tensor's bytes from the archive's directory and its inert pickle; `frame` makes the bytes around a
tensor so that torch reads the result as an archive of its own, with the tensor on a 4 KiB boundary of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from ckpt_tools.core.dtypes import BY_TORCH_NAME, DTYPES, DType
from ckpt_tools.core.errors import FormatError, UsageError
from ckpt_tools.core.tensors import row_major
from ckpt_tools.formats.dcp import archive
from ckpt_tools.formats.dcp.inert import ORDERED_DICT, SIZE, Global, Persistent, Record
from ckpt_tools.formats.dcp.pickle_reader import loads
from ckpt_tools.formats.dcp.pickle_writer import dumps
from ckpt_tools.formats.documents import pread_exact

ALIGNMENT: Final = 4096
_MAX_DATA_PICKLE: Final = 1 << 20
_EDGE: Final = 1024  # torch keeps everything but the tensor in the first and last few hundred bytes
_ARCHIVE: Final = "archive"

_TYPED_STORAGES: Final = {
    "BoolStorage": DTYPES["BOOL"],
    "ByteStorage": DTYPES["U8"],
    "CharStorage": DTYPES["I8"],
    "ShortStorage": DTYPES["I16"],
    "IntStorage": DTYPES["I32"],
    "LongStorage": DTYPES["I64"],
    "HalfStorage": DTYPES["F16"],
    "BFloat16Storage": DTYPES["BF16"],
    "FloatStorage": DTYPES["F32"],
    "DoubleStorage": DTYPES["F64"],
    "ComplexFloatStorage": DTYPES["C64"],
}
_STORAGE_NAMES: Final = {dtype.name: name for name, dtype in _TYPED_STORAGES.items()}
_UNTYPED: Final = Global("torch.storage", "UntypedStorage")
_REBUILD_V2: Final = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_V3: Final = Global("torch._utils", "_rebuild_tensor_v3")
_REBUILD_PARAMETER: Final = Global("torch._utils", "_rebuild_parameter")
_ALLOWED: Final = frozenset(
    {_UNTYPED, Global("torch", "UntypedStorage"), _REBUILD_V2, _REBUILD_V3, _REBUILD_PARAMETER, ORDERED_DICT, SIZE}
    | {Global("torch", name) for name in _TYPED_STORAGES}
    | {Global("torch", name) for name in BY_TORCH_NAME}
)


class SavedTensor(NamedTuple):
    """What `data.pkl` says: a strided view of one storage. Offset and strides count elements."""

    dtype: DType
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: str

    @property
    def extent(self) -> int:
        """Elements of the storage that the view needs, from the storage's start."""
        if 0 in self.sizes:
            return 0
        return self.offset + 1 + sum((n - 1) * stride for n, stride in zip(self.sizes, self.strides, strict=True))

    @property
    def overlaps(self) -> bool:
        """Whether elements may share bytes, as an expanded tensor's do; the writers of DCP make copies of such."""
        reach = 0
        for stride, n in sorted((stride, n) for n, stride in zip(self.sizes, self.strides, strict=True) if n > 1):
            if stride <= reach:
                return True
            reach += (n - 1) * stride
        return False


class LocatedTensor(NamedTuple):
    """A tensor in a file: absolute position of its first element, strides (None when row-major), and the place of the
    storage that it is a view of, with its CRC-32 or 0."""

    dtype: DType
    sizes: tuple[int, ...]
    position: int
    strides: tuple[int, ...] | None
    storage: archive.Stored


def locate(fd: int, start: int, length: int, path: Path) -> LocatedTensor:
    """Where the tensor lies that `torch.save` wrote to the bytes `[start, start + length)` of an open file.

    Reads two small pieces and not the tensor.

    Raises:
        FormatError: not a stored archive of one tensor, compressed, big-endian, or with records out of bounds.
    """

    def fail(fault: str) -> NoReturn:
        raise FormatError(f"{path}, tensor at byte {start:,}: {fault}", hint="save the checkpoint again with torch")

    if length < archive.MIN_SIZE:
        fail(f"{length} bytes are too short for a torch.save archive")
    head = pread_exact(fd, min(length, _EDGE), start, path)
    tail_at = max(0, length - _EDGE)
    tail = pread_exact(fd, length - tail_at, start + tail_at, path) if tail_at else head

    def read(position: int, count: int) -> bytes:
        if position + count <= len(head):
            return head[position : position + count]
        if position >= tail_at:
            return tail[position - tail_at : position - tail_at + count]
        return pread_exact(fd, count, start + position, path)

    entries = archive.read_directory(read, length, fail)
    pickled = _stored(entries, "data.pkl", read, fail)
    if pickled.size > _MAX_DATA_PICKLE:
        fail(f"data.pkl has {pickled.size:,} bytes, too many for one tensor")
    if "byteorder" in entries:
        order = _stored(entries, "byteorder", read, fail)
        if order.size > 16 or read(order.position, order.size) != b"little":
            fail("the tensor is not stored in little-endian byte order")
    try:
        saved = _read_pickle(read(pickled.position, pickled.size))
    except FormatError as error:
        fail(error.message)
    if saved.overlaps and 0 not in saved.sizes:
        fail(f"strides {list(saved.strides)} place elements of {list(saved.sizes)} on each other")
    storage = _stored(entries, f"data/{saved.storage}", read, fail)
    if saved.extent * saved.dtype.itemsize > storage.size:
        fail(f"{list(saved.sizes)} elements of {saved.dtype} do not fit in the {storage.size:,} bytes stored")
    storage = storage._replace(position=start + storage.position)
    position = storage.position + saved.offset * saved.dtype.itemsize
    return LocatedTensor(saved.dtype, saved.sizes, position, _unless_row_major(saved.sizes, saved.strides), storage)


def _stored(
    entries: dict[str, archive.Entry],
    name: str,
    read: Callable[[int, int], bytes],
    fail: Callable[[str], NoReturn],
) -> archive.Stored:
    entry = entries.get(name)
    if entry is None:
        fail(f"the archive has no {name}, so it is not one tensor written by torch.save")
    return archive.find_data(entry, read, fail)


@lru_cache(maxsize=4096)
def _unless_row_major(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    if prod(sizes) <= 1:
        return None
    plain = row_major(sizes)
    same = all(n == 1 or have == want for n, have, want in zip(sizes, strides, plain, strict=True))
    return None if same else strides


@lru_cache(maxsize=4096)
def _read_pickle(data: bytes) -> SavedTensor:
    value = loads(data, _ALLOWED, "data.pkl")
    if isinstance(value, Record) and value.kind == _REBUILD_PARAMETER and value.args:
        value = value.args[0]
    if not isinstance(value, Record) or value.kind not in (_REBUILD_V2, _REBUILD_V3):
        raise FormatError("the saved object is not a plain tensor")
    args = value.args
    plain = 6 if value.kind == _REBUILD_V2 else 7
    if len(args) < plain or any(args[plain:]):
        raise FormatError("the saved tensor has attributes that are not understood")
    untyped = args[6] if value.kind == _REBUILD_V3 else None
    dtype, key = _read_storage(args[0], untyped)
    offset, sizes, strides = args[1], _counts(args[2]), _counts(args[3])
    if not isinstance(offset, int) or offset < 0 or len(sizes) != len(strides):
        raise FormatError("the saved tensor has an impossible offset, shape or stride")
    return SavedTensor(dtype, sizes, strides, offset, key)


def _counts(value: object) -> tuple[int, ...]:
    if isinstance(value, tuple) and len(value) <= 64:
        counts = tuple(n for n in value if type(n) is int and 0 <= n < 1 << 62)
        if len(counts) == len(value):
            return counts
    raise FormatError("the saved tensor has an impossible offset, shape or stride")


def _read_storage(reference: object, untyped: object) -> tuple[DType, str]:
    pid = reference.pid if isinstance(reference, Persistent) else None
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[2], str):
        raise FormatError("the saved tensor does not refer to a storage")
    kind = pid[1]
    if isinstance(untyped, Global) and untyped.module == "torch" and untyped.name in BY_TORCH_NAME:
        return BY_TORCH_NAME[untyped.name], pid[2]
    if untyped is None and isinstance(kind, Global) and kind.name in _TYPED_STORAGES:
        return _TYPED_STORAGES[kind.name], pid[2]
    raise FormatError("the saved tensor has an element type that is not understood")


class Frame(NamedTuple):
    """The bytes around one tensor.

    Attributes:
        head: from the archive's first byte on.
        padding: zeros after it, up to the tensor; they may be left as a hole.
        data_position: absolute position of the tensor in the file, a multiple of 4096 and the residue asked for.
        suffix: from the tensor's end to the archive's end.
        end: absolute position after the suffix, where the next archive may start.
    """

    head: bytes
    padding: int
    data_position: int
    suffix: bytes
    end: int

    @property
    def prefix(self) -> bytes:
        """From the archive's first byte to the tensor."""
        return self.head + bytes(self.padding)


def frame(dtype: DType, sizes: Sequence[int], position: int, residue: int = 0) -> Frame:
    """The archive for a row-major tensor that starts at the absolute byte `position` of a file.

    The tensor itself starts `residue` bytes after a multiple of 4096.

    The checksum field of the tensor is 0, as torch writes it under `set_crc32_options(False)`: the bytes are not known
    when the frame is made, and torch does not check it. The digests of a checkpoint are in its manifest.

    Raises:
        UsageError: torch has no such element type, or packs several elements in a byte.
    """
    nbytes = dtype.nbytes(prod(sizes))
    small, central = _small_entries(dtype, tuple(sizes))
    name = f"{_ARCHIVE}/data/0"
    header, padding, record = archive.large_entry(name, nbytes, len(small), position, ALIGNMENT, residue)
    before = len(small) + len(header) + padding
    suffix = archive.directory([*central, record], before + nbytes)
    data_position = position + before
    return Frame(small + header, padding, data_position, suffix, data_position + nbytes + len(suffix))


@lru_cache(maxsize=4096)
def _small_entries(dtype: DType, sizes: tuple[int, ...]) -> tuple[bytes, list[bytes]]:
    """What is before the tensor's own entry, and the directory records of that."""
    return archive.join(
        [
            archive.small_entry(f"{_ARCHIVE}/data.pkl", _write_pickle(dtype, sizes)),
            archive.small_entry(f"{_ARCHIVE}/byteorder", b"little"),
            archive.small_entry(f"{_ARCHIVE}/version", b"3\n"),
        ]
    )


def _write_pickle(dtype: DType, sizes: tuple[int, ...]) -> bytes:
    if dtype.torch_name is None or dtype.bits < 8:
        raise UsageError(f"a torch checkpoint cannot hold {dtype} tensors", hint="write safetensors instead")
    numel = prod(sizes)
    typed = _STORAGE_NAMES.get(dtype.name)
    kind = Global("torch", typed) if typed else _UNTYPED
    storage = Persistent(("storage", kind, "0", "cpu", numel if typed else numel * dtype.itemsize))
    # An empty OrderedDict() call, as torch writes for the backward hooks.
    args = (storage, 0, sizes, row_major(sizes), False, Record(ORDERED_DICT))
    if typed:
        return dumps(Record(_REBUILD_V2, args))
    return dumps(Record(_REBUILD_V3, (*args, Global("torch", dtype.torch_name))))
