"""The `.metadata` document of DCP as plain values: which tensors there are, their chunks, and where each is stored."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final, NoReturn

from ckpt_tools.core.dtypes import BY_TORCH_NAME, DType
from ckpt_tools.core.errors import FormatError
from ckpt_tools.core.names import MAX_NAME_LENGTH
from ckpt_tools.formats.dcp.inert import ORDERED_DICT, SIZE, Global, Record
from ckpt_tools.formats.dcp.pickle_reader import loads
from ckpt_tools.formats.tiling import Box

_METADATA_MODULE: Final = "torch.distributed.checkpoint.metadata"
_OLD_METADATA_MODULE: Final = "torch.distributed._shard.sharded_tensor.metadata"  # up to torch 2.1
METADATA: Final = Global(_METADATA_MODULE, "Metadata")
TENSOR: Final = Global(_METADATA_MODULE, "TensorStorageMetadata")
BYTES: Final = Global(_METADATA_MODULE, "BytesStorageMetadata")
PROPERTIES: Final = Global(_METADATA_MODULE, "TensorProperties")
CHUNK: Final = Global(_METADATA_MODULE, "ChunkStorageMetadata")
INDEX: Final = Global(_METADATA_MODULE, "MetadataIndex")
STORAGE_META: Final = Global(_METADATA_MODULE, "StorageMeta")
MEMORY_FORMAT: Final = Global(_METADATA_MODULE, "_MEM_FORMAT_ENCODING")
STORAGE_INFO: Final = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
LAYOUT: Final = Global("torch.serialization", "_get_layout")

ALLOWED: Final = frozenset(
    {METADATA, TENSOR, BYTES, PROPERTIES, CHUNK, INDEX, STORAGE_META, MEMORY_FORMAT, STORAGE_INFO, LAYOUT, SIZE}
    | {ORDERED_DICT, Global("torch.distributed.checkpoint.storage", "StorageMeta")}
    | {Global(_OLD_METADATA_MODULE, name) for name in ("TensorProperties", "MEM_FORMAT_ENCODING")}
    | {Global(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")}
    | {Global("torch", name) for name in (*BY_TORCH_NAME, "complex32", "complex128")}
)


@dataclass(frozen=True, slots=True)
class Location:
    """Bytes of one entry."""

    file: str
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class DescribedTensor:
    """A tensor as the document describes it; `boxes` without repetitions, in the order of the document."""

    dtype: DType
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Description:
    """The document.

    Attributes:
        tensors: by name.
        blobs: names of entries that are pickled objects; they are never opened.
        locations: by name and offsets of the chunk.
        roots: key of the saved state dict that an entry was nested under, by name, for those that were.
    """

    tensors: dict[str, DescribedTensor]
    blobs: tuple[str, ...]
    locations: dict[tuple[str, tuple[int, ...]], Location]
    roots: dict[str, str]


def parse(data: bytes, source: str) -> Description:
    """The content of a `.metadata` file.

    Raises:
        FormatError: a pickle that asks for anything but data, or a document that is not what torch writes.
    """
    reader = _Reader(source)
    document = reader.fields(loads(data, ALLOWED, source), METADATA)
    entries = document.get("state_dict_metadata")
    if not isinstance(entries, dict):
        reader.fail("there is no state_dict_metadata")
    tensors: dict[str, DescribedTensor] = {}
    blobs = []
    for name, entry in entries.items():
        if not isinstance(name, str):
            reader.fail("the name of an entry is not text")
        if isinstance(entry, Record) and entry.kind == BYTES:
            blobs.append(name)
        else:
            if len(name) > MAX_NAME_LENGTH or not name.isprintable():
                reader.fail(f"{name[:80]!r} is not a usable tensor name")
            tensors[name] = reader.tensor(name, entry)
    roots = _roots(document.get("planner_data"))
    return Description(tensors, tuple(blobs), reader.locations(document.get("storage_data")), roots)


def _roots(paths: object) -> dict[str, str]:
    """What torch's planner notes of flattened names: the path of each in the nested state dict."""
    found: dict[str, str] = {}
    for name, path in paths.items() if isinstance(paths, dict) else ():
        if isinstance(name, str) and isinstance(path, tuple) and len(path) > 1 and isinstance(path[0], str):
            found[name] = path[0]
    return found


class _Reader:
    """Turns records into values, or fails with the name of the file."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, fault: str) -> NoReturn:
        raise FormatError(f"{self.source}: {fault}", hint="the file is damaged, or another program's format")

    def fields(self, value: object, kind: Global) -> dict[str, object]:
        if not isinstance(value, Record) or value.kind != kind:
            self.fail(f"a {kind.name} is expected and something else is there")
        return value.fields()

    def counts(self, value: object, what: str) -> tuple[int, ...]:
        if not isinstance(value, tuple) or len(value) > 64:
            self.fail(f"{what} is not a shape")
        for n in value:
            if type(n) is not int or not 0 <= n < 1 << 62:
                self.fail(f"{what} is not a shape")
        return value

    def tensor(self, name: str, entry: object) -> DescribedTensor:
        fields = self.fields(entry, TENSOR)
        shape = self.counts(fields.get("size"), f"the size of {name!r}")
        if prod(shape) >= 1 << 62:
            self.fail(f"{name!r} has an impossible number of elements: {list(shape)}")
        chunks = fields.get("chunks")
        if not isinstance(chunks, list):
            self.fail(f"{name!r} has no list of chunks")
        boxes: dict[Box, None] = {}
        for chunk in chunks:
            described = self.fields(chunk, CHUNK)
            offsets = self.counts(described.get("offsets"), f"the offset of a chunk of {name!r}")
            boxes[offsets, self.counts(described.get("sizes"), f"the size of a chunk of {name!r}")] = None
        return DescribedTensor(self.dtype(name, fields.get("properties")), shape, tuple(boxes))

    def dtype(self, name: str, properties: object) -> DType:
        state = properties.state if isinstance(properties, Record) else None
        if isinstance(state, dict):
            state = (state.get("dtype"), state.get("layout"))
        if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[0], Global):
            self.fail(f"the properties of {name!r} are not understood")
        layout = state[1]
        if isinstance(layout, Record) and layout.args != ("torch.strided",):
            self.fail(f"{name!r} is not a dense tensor")
        found = BY_TORCH_NAME.get(state[0].name)
        if found is None:
            self.fail(f"{name!r} has the element type {state[0]}, which is not supported")
        return found

    def locations(self, storage_data: object) -> dict[tuple[str, tuple[int, ...]], Location]:
        if not isinstance(storage_data, dict):
            self.fail("there is no storage_data, so the chunks cannot be found")
        found: dict[tuple[str, tuple[int, ...]], Location] = {}
        for key, value in storage_data.items():
            index = self.fields(key, INDEX)
            name, offset = index.get("fqn"), index.get("offset")
            if not isinstance(name, str):
                self.fail("the name of a stored entry is not text")
            if offset is None:
                continue  # a pickled object
            place = (name, self.counts(offset, f"the offset of a chunk of {name!r}"))
            location = self.location(name, value)
            if found.setdefault(place, location) != location:
                self.fail(f"the chunk of {name!r} at {list(place[1])} is stored in two places")
        return found

    def location(self, name: str, value: object) -> Location:
        info = self.fields(value, STORAGE_INFO)
        file, position, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if not isinstance(file, str) or not isinstance(position, int) or not isinstance(length, int):
            self.fail(f"the place of {name!r} is not understood")
        if position < 0 or length < 0:
            self.fail(f"the place of {name!r} is not understood")
        if info.get("transform_descriptors"):
            self.fail(f"{name!r} is stored through an extension such as compression, which cannot be read")
        return Location(file, position, length)
