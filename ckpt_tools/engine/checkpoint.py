"""A checkpoint opened from its headers: what format it is in, which family, and which side of the layout it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_tools.core.collector import no_collection
from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.errors import FormatError, LayoutError, NotFoundError
from ckpt_tools.core.paths import is_there
from ckpt_tools.core.storage import storage_errors
from ckpt_tools.core.tensors import Store, StoredTensor
from ckpt_tools.engine.ends import End, leaf_ends, prove_end
from ckpt_tools.engine.extents import addressable
from ckpt_tools.engine.files import Identity, identities
from ckpt_tools.engine.manifest import Manifest, read_manifest
from ckpt_tools.engine.recognise import recognise
from ckpt_tools.formats import dcp, hf, sharded_safetensors
from ckpt_tools.formats.documents import read_json_object
from ckpt_tools.layouts.encodings import VALUES
from ckpt_tools.layouts.layout import Layout, Side

MODEL_FOLDERS = ("pytorch_model_fsdp_0", "model")
"""Folders in which accelerate and NeMo AutoModel save the model, beside one for the optimizer."""


@dataclass
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        root: its directory.
        store: its tensors and where they lie; tied duplicates and dropped buffers are not among them.
        layout: the correspondence of its family for its config.
        side: which side of the layout the names are.
        config: its config.json, empty when there is none.
        side_root: where its config, tokenizer and other side files lie.
        side_files: their relative paths.
        manifest: its `ckpt-manifest.json`, or None.
        duplicates: tied names that the files hold although the config shares them, with the name they share.
        dropped: names left out because they hold no weights, with the reason.
        shared: leaves that have no tensor of their own, with the leaf whose values they have.
        prefix: what the stored names begin with beside the model's own, such as `model.`.
        inputs: what the files beside each other in `root` and in its `hf` were before the first of them was read.
    """

    root: Path
    store: Store
    layout: Layout
    side: Side
    config: Mapping[str, Any]
    side_root: Path
    side_files: tuple[str, ...]
    manifest: Manifest | None = None
    duplicates: dict[str, StoredTensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    inputs: Mapping[str, Identity] = field(default_factory=dict)

    @property
    def spelling(self) -> str:
        """Whose names the tensors have: `hf`, `native`, or the name of another dialect."""
        return self.layout.spelling(self.side)

    @property
    def digests(self) -> Mapping[str, str] | None:
        """Digests of the leaves that the manifest records; None where it has none for leaves of this form, or has them
        by another algorithm (`Manifest.foreign_digests`)."""
        manifest = self.manifest
        if manifest is None or manifest.foreign_digests or manifest.form != self.layout.leaf_form:
            return None
        return manifest.tensors

    @property
    def is_encoded(self) -> bool:
        """Whether leaves are stored in a quantised form."""
        return self.side == "hf" and any(leaf.encoding for leaf in self.layout.leaves.values())

    @no_collection()
    def ends(self) -> dict[str, End]:
        """Where every leaf lies, each proven to be there exactly once.

        Raises:
            LayoutError: an element of a leaf is missing or stored twice.
        """
        own = dict.fromkeys(name for name in self.layout.leaves if name not in self.shared)
        found = leaf_ends(self.store, self.layout, self.side, own)
        for name, end in found.items():
            _, items = addressable(end.dtype, self.layout.leaves[name].numel)
            prove_end(name, end, items, str(self.root))
        return found | {name: found[other] for name, other in self.shared.items()}

    def untied(self) -> Checkpoint:
        """This checkpoint with a leaf for each of two tied names, as a model that does not tie them has."""
        leaves = self.layout.leaves
        both = {name: replace(leaves[other], name=name) for name, other in self.layout.tied.items()}
        layout = replace(self.layout, leaves={**leaves, **both}, tied={})
        return replace(self, layout=layout, shared={**self.shared, **self.layout.tied})

    def leaf_dtypes(self) -> dict[str, DType]:
        """Dtype of the values of every leaf."""
        tensors, leaves = self.store.tensors, self.layout.leaves.values()
        if self.side == "hf":
            found = {
                leaf.name: VALUES if leaf.encoding else tensors[leaf.name].dtype
                for leaf in leaves
                if leaf.name not in self.shared
            }
        else:
            native = self.layout.native
            found = {leaf: tensor.dtype for name, tensor in tensors.items() for leaf in native[name].leaves}
        return found | {name: found[other] for name, other in self.shared.items()}


@no_collection()
def open_checkpoint(
    path: Path,
    *,
    family: str | None = None,
    form: str | None = None,
    dialect: str | None = None,
    like: Path | None = None,
) -> Checkpoint:
    """Opens a Hugging Face repository, a native checkpoint or one that some trainer saved, from its headers.

    Args:
        path: its directory, or the one around it where accelerate or NeMo AutoModel put the model into a folder.
        family: name of the family, `identity` for names as they are; None reads it from config.json.
        form: for a native checkpoint, the form of the Hugging Face side that it is seen against: `fp8`, empty for the
            plain one, None for the one that its manifest speaks of.
        dialect: whose names the tensors have: `hf`, `native`, `torchtitan`, ...; None finds it out from the names.
        like: directory of a repository of the same model, whose config.json and side files are taken.

    Raises:
        NotFoundError: there is nothing there.
        FormatError: a file is malformed.
        LayoutError: names or shapes are not those of the family.
        UsageError: the names are those of several dialects, or not those of the one that is given.
        StorageError: the operating system failed a read.
    """
    with storage_errors("read", Path(path)):
        return _open(Path(path), family, form, dialect, like)


def _open(path: Path, family: str | None, form: str | None, dialect: str | None, like: Path | None) -> Checkpoint:
    if not path.is_dir():
        raise NotFoundError(f"{path} is not a directory", hint="give the directory of a checkpoint")
    root = _root_of(path)
    inputs = identities(root)
    if _own_folder(root, "hf").is_dir():
        inputs |= {f"hf/{name}": identity for name, identity in identities(root / "hf").items()}
    store = _open_store(root)
    side_root = _side_root(path, store.root) if like is None else _side_root(like, like)
    config = read_config(side_root)
    if like is not None and not config:
        raise NotFoundError(f"{like} has no config.json", hint="give the directory of a repository with --like")
    manifest = read_manifest(store.root)
    if form is None:
        form = manifest.form if manifest else ""
    found = recognise(store, config, family=family, dialect=dialect, form=form, where=path)
    store.tensors = found.tensors
    checkpoint = Checkpoint(
        store.root,
        store,
        found.layout,
        found.side,
        config,
        side_root,
        hf.side_files(side_root),
        manifest,
        found.duplicates,
        found.dropped,
        found.layout.lent,
        found.prefix,
        inputs,
    )
    _check_shapes(checkpoint)
    return checkpoint


def _root_of(path: Path) -> Path:
    """The directory of the tensors: the given one, or the folder in it that trainers put a model's into."""
    for root in (path, *(_own_folder(path, folder) for folder in MODEL_FOLDERS)):
        if is_there(root / ".metadata") or sharded_safetensors.is_sharded(root):
            return root
        if root is path and any(name.endswith(".safetensors") for name in os.listdir(path)):
            break
    return path


def _open_store(root: Path) -> Store:
    if is_there(root / ".metadata"):
        return dcp.open_dcp(root)
    return (
        sharded_safetensors.open_sharded(root)
        if sharded_safetensors.is_sharded(root)
        else hf.open_repository(root).store
    )


def _side_root(path: Path, root: Path) -> Path:
    """Where the config and side files of a checkpoint lie: in a folder beside its tensors, or with them."""
    beside = _own_folder(root, "hf")
    if beside.is_dir():
        return beside
    places = (_own_folder(root, ".hf_metadata"), root, path)
    return next((place for place in places if (place / hf.CONFIG).exists()), root)


def _own_folder(root: Path, name: str) -> Path:
    """A folder of a checkpoint, that may be missing.

    Raises:
        FormatError: it is a link, which could lead out of the checkpoint.
    """
    path = root / name
    if path.is_symlink():
        raise FormatError(f"{path} is a symbolic link", hint="put the folder in its place")
    return path


def read_config(root: Path) -> Mapping[str, Any]:
    """The config.json of a directory, or an empty mapping when there is none.

    Raises:
        FormatError: it is not a JSON object.
    """
    path = root / "config.json"
    return read_json_object(path) if is_there(path) else {}


def config_of(path: Path) -> Mapping[str, Any]:
    """The config.json of the checkpoint in a directory, in whichever of its folders; empty when there is none.

    Raises:
        FormatError: it is not a JSON object, or in a folder that is a link.
        StorageError: the operating system failed a read.
    """
    with storage_errors("read", path):
        return read_config(_side_root(path, _root_of(path)))


def has_weights(path: Path) -> bool:
    """Whether a checkpoint's directory has files of weights, whole or not, or an index that says which there should be.

    Raises:
        StorageError: it cannot be listed.
    """
    with storage_errors("list", path):
        names = os.listdir(_root_of(path))
    return any(name == ".metadata" or name.endswith((*hf.WEIGHT_SUFFIXES, ".index.json")) for name in names)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _check_shapes(checkpoint: Checkpoint) -> None:
    layout, tensors = checkpoint.layout, checkpoint.store.tensors
    shapes = layout.shapes(checkpoint.side)
    differ = {name for name, tensor in tensors.items() if tensor.shape != shapes[name]}
    wrong = []
    encoded = set()
    for leaf, parts in layout.parts.items() if checkpoint.side == "hf" else ():
        for part in parts:
            stored = tensors[part.name]
            encoded.add(part.name)
            if part.name in differ and _squeezed(stored.shape) == _squeezed(part.shape):
                differ.discard(part.name)
            if stored.dtype is not part.dtype and not (stored.dtype.is_float and part.dtype.is_float):
                wrong.append(f"{part.name} is {stored.dtype}, the {layout.form} form of {leaf} has {part.dtype}")
    wrong += [f"{n} is {list(tensors[n].shape)}, the config says {list(shapes[n])}" for n in tensors if n in differ]
    for name in layout.leaves.keys() & tensors.keys() if not layout.is_identity else ():
        dtype = tensors[name].dtype
        if name not in encoded and not dtype.name.startswith(("F", "BF")):
            wrong.append(f"{name} is {dtype}, and weights are floating point")
    for name, tensor in checkpoint.duplicates.items():
        other = checkpoint.store.tensors[layout.native_tied[name]]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            wrong.append(f"{name} is tied to {other.name} by the config but differs from it in shape or dtype")
    if wrong:
        raise LayoutError(
            f"{checkpoint.root}: tensors do not fit config.json:\n  " + "\n  ".join(wrong[:10]),
            hint="the config belongs to another checkpoint, or the checkpoint is damaged",
        )
