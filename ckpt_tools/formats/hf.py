"""A Hugging Face repository on disk: config, safetensors files with or without an index, and the files beside them.

`open_repository` reads headers only and lists everything that is wrong at once; `plan_repository` plans the files of
a new one. Side files (tokenizer, templates, generation config, remote code) are named here and copied by the engine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.errors import FormatError, NotFoundError, UsageError, listed
from ckpt_tools.core.names import MAX_NAME_LENGTH
from ckpt_tools.core.paths import is_there, open_input, safe_join
from ckpt_tools.core.tensors import Chunk, Framing, Store, StoredTensor, TargetFiles
from ckpt_tools.formats.arrangement import congruent_files
from ckpt_tools.formats.documents import read_json_object, read_whole
from ckpt_tools.formats.safetensors import SafetensorsHeader, plan_file, read_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SUMS = "SHA256SUMS"
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data"),
    *(".ot", ".npz", ".tflite", ".distcp", ".mlmodel", ".nemo", ".pkl", ".pickle", ".joblib"),
)
_NOT_SIDE_FILES = frozenset({CONFIG, "ckpt-manifest.json", SUMS})
_SIDE_FOLDER_DEPTH = 3
_MAX_SIDE_FILE = 1 << 30


@dataclass(frozen=True, slots=True)
class Repository:
    """An opened repository.

    Attributes:
        store: its tensors, of kind `safetensors`.
        config: the content of config.json, empty when there is none.
        side_files: the other files that make the model usable, by relative path, sorted. Not among them: weights in
            any format, indices, hidden files, and folders that hold weights (`original/`, `onnx/`, trainer states).
    """

    store: Store
    config: dict[str, object]
    side_files: tuple[str, ...]


class SideFile(NamedTuple):
    """A side file of a checkpoint: the directory that it may not leave, and its path in there."""

    root: Path
    name: str

    def read(self) -> bytes:
        """All its bytes.

        Raises:
            NotFoundError, FormatError, StorageError: it is gone, no regular file, a link out of the directory, longer
                than any side file, or unreadable.
        """
        return read_whole(self.root / self.name, _MAX_SIDE_FILE, self.root)


def open_repository(root: Path) -> Repository:
    """The repository in the directory `root`, from its headers.

    Raises:
        NotFoundError: no such directory, or no safetensors file in it.
        FormatError: the index and the files disagree (missing, unlisted and repeated files and tensors are listed
            together), a name leaves the directory, or a header is malformed.
    """
    if not root.is_dir():
        raise NotFoundError(f"{root} is not a directory")
    config = read_json_object(root / CONFIG) if is_there(root / CONFIG) else {}
    return Repository(_open_store(root), config, side_files(root))


def _open_store(root: Path) -> Store:
    present = sorted(name for name in os.listdir(root) if name.endswith(".safetensors"))
    if is_there(root / INDEX):
        weight_map = _read_weight_map(root)
        files = list(dict.fromkeys(weight_map.values()))
    else:
        weight_map = None
        files = [_only_file(root, present)]
    faults = [f"{name}: the index does not list this file" for name in present if name not in files]
    headers: dict[str, SafetensorsHeader] = {}
    for file in files:
        path = safe_join(root, file, named_by=str(root / INDEX))
        try:
            headers[file] = read_header(path, root)
        except NotFoundError:
            faults.append(f"{file}: the index lists this file, which does not exist")
    faults += _disagreements(weight_map, headers) if weight_map is not None else []
    if faults:
        raise FormatError(
            f"{root} is not a whole repository: {len(faults):,} faults\n{listed(faults, 20)}",
            hint="fetch the missing files again, or move files that are not part of the model out of the directory",
        )
    return _store(root, headers)


def _read_weight_map(root: Path) -> dict[str, str]:
    weight_map = read_json_object(root / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{root / INDEX} has no weight_map")
    for name, file in weight_map.items():
        if len(name) > MAX_NAME_LENGTH:
            raise FormatError(f"{root / INDEX} lists {name[:80]!r}..., which is not a usable tensor name")
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            what = str(file)[:200]
            raise FormatError(f"{root / INDEX} maps {name!r} to {what!r}, which is not the name of a safetensors file")
    return weight_map


def _only_file(root: Path, present: list[str]) -> str:
    if SINGLE in present and len(present) == 1:
        return SINGLE
    if not present:
        _refuse_without_safetensors(root)
    if len(present) > 1:
        raise FormatError(
            f"{root} holds {len(present):,} safetensors files and no {INDEX}\n{listed(present)}",
            hint="fetch the index, or leave only one file",
        )
    return present[0]


def _refuse_without_safetensors(root: Path) -> None:
    others = sorted(name for name in os.listdir(root) if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if others:
        raise FormatError(
            f"{root} holds weights only as pickles, which can run code when they are opened\n{listed(others)}",
            hint="convert them to safetensors with a tool that you trust, in a sandbox",
        )
    raise NotFoundError(f"{root} holds no *.safetensors file")


def _disagreements(weight_map: dict[str, str], headers: dict[str, SafetensorsHeader]) -> list[str]:
    """Tensors that the index places in another file than the one that holds them."""
    faults = []
    for name, file in weight_map.items():
        if file in headers and name not in headers[file].tensors:
            faults.append(f"{name}: the index places it in {file}, which does not hold it")
    for file, header in headers.items():
        for name in header.tensors:
            listed_in = weight_map.get(name)
            if listed_in is None:
                faults.append(f"{name}: {file} holds it and the index does not list it")
            elif listed_in != file:
                faults.append(f"{name}: {file} holds it and the index places it in {listed_in}")
    return faults


def _store(root: Path, headers: dict[str, SafetensorsHeader]) -> Store:
    tensors = {
        name: StoredTensor(
            name, entry.dtype, entry.shape, (Chunk((0,) * len(entry.shape), entry.shape, file, entry.position),)
        )
        for file, header in headers.items()
        for name, entry in header.tensors.items()
    }
    metadata = next(iter(headers.values())).metadata
    files = {file: header.size for file, header in headers.items()}
    return Store(root, "safetensors", tensors, files, metadata=dict(metadata))


def side_files(root: Path) -> tuple[str, ...]:
    """Relative paths of the regular files in `root` that belong to the model and are neither weights nor config.

    Raises:
        FormatError: one is a link out of the repository, which a copy would publish.
    """
    return tuple(sorted(_walk(root, "", _SIDE_FOLDER_DEPTH)))


def _walk(root: Path, folder: str, depth: int) -> Iterator[str]:
    with os.scandir(root / folder) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    # Symbolic links to files are the Hub cache's way of storing; links to directories could lead anywhere.
    files = [entry for entry in entries if entry.is_file()]
    if folder and any(_is_weight(entry.name) for entry in files):
        return
    for entry in files:
        known = not folder and entry.name in _NOT_SIDE_FILES
        if not known and not _is_weight(entry.name) and not entry.name.endswith(".index.json"):
            path = safe_join(root, f"{folder}{entry.name}", named_by=str(root))
            if entry.is_symlink():
                os.close(open_input(path, root))
            yield f"{folder}{entry.name}"
    if depth:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and entry.name not in ("original", "__pycache__"):
                yield from _walk(root, f"{folder}{entry.name}/", depth - 1)


def _is_weight(name: str) -> bool:
    return name.lower().endswith(WEIGHT_SUFFIXES)


def plan_repository(
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]],
    *,
    max_shard_size: int,
    metadata: Mapping[str, str] | None = None,
    residues: Mapping[str, int] | None = None,
) -> TargetFiles:
    """The files of a new repository: shards filled in the order given, and their index.

    Args:
        tensors: dtype and shape by name.
        max_shard_size: bytes of tensor data in one file; a larger tensor gets a file of its own.
        metadata: `__metadata__` of each file; `{"format": "pt"}` by default, without which readers refuse.
        residues: position modulo 4 KiB that a tensor should have. Those that no one file can have get several.

    Returns:
        one `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on with the index document. The root of
        the store is the empty path.
    """
    if max_shard_size <= 0:
        raise UsageError(f"the shard size must be positive, not {max_shard_size}")
    shards: list[dict[str, tuple[DType, tuple[int, ...]]]] = [{}]
    sizes = {name: dtype.nbytes(prod(shape)) for name, (dtype, shape) in tensors.items()}
    for group in congruent_files(sizes, residues) if residues else [list(tensors)]:
        if shards[-1]:
            shards.append({})
        filled = 0
        for name in group:
            if filled and filled + sizes[name] > max_shard_size:
                shards.append({})
                filled = 0
            shards[-1][name] = tensors[name]
            filled += sizes[name]
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    described = {"format": "pt"} if metadata is None else dict(metadata)
    target = plan_files(dict(zip(names, shards, strict=True)), described, residues or {})
    target.store.tensors = {name: target.store.tensors[name] for name in tensors}
    if len(shards) > 1:
        weight_map = {name: tensor.chunks[0].file for name, tensor in target.store.tensors.items()}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        target.documents[INDEX] = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
    return target


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def plan_files(
    files: Mapping[str, Mapping[str, tuple[DType, tuple[int, ...]]]],
    metadata: Mapping[str, str],
    residues: Mapping[str, int],
) -> TargetFiles:
    """Safetensors files with the tensors given for each, all with the same `__metadata__`."""
    store = Store(Path(), "safetensors", {}, {}, metadata=dict(metadata))
    framing = []
    for file, tensors in files.items():
        header, positions, size = plan_file(
            tensors, metadata, {name: residues[name] for name in tensors if name in residues}
        )
        framing.append(Framing(file, 0, header))
        store.files[file] = size
        for name, (dtype, shape) in tensors.items():
            chunk = Chunk((0,) * len(shape), tuple(shape), file, positions[name])
            store.tensors[name] = StoredTensor(name, dtype, tuple(shape), (chunk,))
    return TargetFiles(store, tuple(framing), {})
