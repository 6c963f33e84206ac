"""A checkpoint opened from its headers: what format it is in, which family, and which side of the layout it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.errors import LayoutError, NotFoundError
from ckpt_tools.core.names import match
from ckpt_tools.core.tensors import Store, StoredTensor
from ckpt_tools.engine.digest import ALGORITHM
from ckpt_tools.engine.ends import End, leaf_ends, prove_end
from ckpt_tools.engine.extents import addressable
from ckpt_tools.engine.manifest import Manifest, read_manifest
from ckpt_tools.families import family_of, get_family
from ckpt_tools.formats import dcp, hf, sharded_safetensors
from ckpt_tools.formats.documents import read_json_object
from ckpt_tools.layouts.encodings import VALUES
from ckpt_tools.layouts.layout import Layout, Side, identity


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

    @property
    def digests(self) -> Mapping[str, str] | None:
        """Digests of the leaves that the manifest records, None where it has none for leaves of this form."""
        manifest = self.manifest
        known = manifest is not None and manifest.form == self.layout.leaf_form and manifest.digest == ALGORITHM
        return manifest.tensors if manifest is not None and known else None

    @property
    def is_encoded(self) -> bool:
        """Whether leaves are stored in a quantised form."""
        return self.side == "hf" and any(leaf.encoding for leaf in self.layout.leaves.values())

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
        return replace(
            self, layout=replace(self.layout, leaves={**leaves, **both}, tied={}), shared=dict(self.layout.tied)
        )

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
            found = {
                piece.leaf: tensor.dtype
                for name, tensor in tensors.items()
                for piece in self.layout.native[name].view.pieces
            }
        return found | {name: found[other] for name, other in self.shared.items()}


def open_checkpoint(path: Path, *, family: str | None = None, form: str | None = None) -> Checkpoint:
    """Opens a Hugging Face repository, a native checkpoint or a training checkpoint from its headers.

    Args:
        path: its directory.
        family: name of the family, `identity` for names as they are; None reads it from config.json.
        form: for a native checkpoint, the form of the Hugging Face side that it is seen against: `fp8`, empty for the
            plain one, None for the one that its manifest speaks of.

    Raises:
        NotFoundError: there is nothing there.
        FormatError: a file is malformed.
        LayoutError: names or shapes are not those of the family.
    """
    path = Path(path)
    if not path.is_dir():
        raise NotFoundError(f"{path} is not a directory", hint="give the directory of a checkpoint")
    store, side_root, config, side_files = _open_files(path)
    manifest = read_manifest(path)
    if form is None:
        form = manifest.form if manifest else ""
    layout, side, duplicates, dropped = _recognise(store, config, family, form, path)
    checkpoint = Checkpoint(path, store, layout, side, config, side_root, side_files, manifest, duplicates, dropped)
    _check_shapes(checkpoint)
    return checkpoint


def _open_files(path: Path) -> tuple[Store, Path, Mapping[str, Any], tuple[str, ...]]:
    if (path / ".metadata").exists() or sharded_safetensors.is_sharded(path):
        is_dcp = (path / ".metadata").exists()
        store = dcp.open_dcp(path) if is_dcp else sharded_safetensors.open_sharded(path)
        side_root = path / "hf" if (path / "hf").is_dir() else path
        return store, side_root, read_config(side_root), hf.side_files(side_root)
    repository = hf.open_repository(path)
    return repository.store, path, repository.config, repository.side_files


def read_config(root: Path) -> Mapping[str, Any]:
    """The config.json of a directory, or an empty mapping when there is none.

    Raises:
        FormatError: it is not a JSON object.
    """
    path = root / "config.json"
    return read_json_object(path) if path.exists() else {}


def _recognise(
    store: Store, config: Mapping[str, Any], family: str | None, form: str, path: Path
) -> tuple[Layout, Side, dict[str, StoredTensor], dict[str, str]]:
    chosen = None if family == "identity" else get_family(family) if family else family_of(config)
    if chosen is None:
        return identity({name: t.shape for name, t in store.tensors.items()}), "hf", {}, {}
    layout = chosen.layout(config, names=store.tensors.keys())
    dropped = {
        name: "a buffer that holds no weights" for name in store.tensors if any(match(t, name) for t in layout.dropped)
    }
    dropped |= dict.fromkeys(layout.beside & store.tensors.keys(), "a scale of activations, which plain weights lack")
    duplicates = {name: store.tensors[name] for name in layout.tied if name in store.tensors}
    for name in (*dropped, *duplicates):
        del store.tensors[name]
    names = store.tensors.keys()
    # The side is chosen by names, never by shape. Where neither fits, the error speaks of the nearer one.
    side = layout.side_of(names, tie="hf" if store.kind == "safetensors" else "native")
    if side == "native" and form:
        layout = chosen.layout(config, form=form, names=names)
    layout.check_names(names, side, str(path))
    return layout, side, duplicates, dropped


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _check_shapes(checkpoint: Checkpoint) -> None:
    layout = checkpoint.layout
    wrong = []
    shapes = layout.shapes(checkpoint.side)
    encoded = [leaf for leaf in layout.leaves.values() if leaf.encoding] if checkpoint.side == "hf" else []
    parts = {p.name: (p, leaf) for leaf in encoded if leaf.encoding for p in leaf.encoding.parts(leaf.name, leaf.shape)}
    for name, tensor in checkpoint.store.tensors.items():
        if tensor.shape != shapes[name] and not (name in parts and _squeezed(tensor.shape) == _squeezed(shapes[name])):
            wrong.append(f"{name} is {list(tensor.shape)}, the config says {list(shapes[name])}")
    for part, leaf in parts.values():
        dtype = checkpoint.store.tensors[part.name].dtype
        if dtype is not part.dtype and not (dtype.is_float and part.dtype.is_float):
            wrong.append(f"{part.name} is {dtype}, the {layout.form} form of {leaf.name} has {part.dtype}")
    for name, tensor in checkpoint.duplicates.items():
        other = checkpoint.store.tensors[layout.tied[name]]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            wrong.append(f"{name} is tied to {other.name} by the config but differs from it in shape or dtype")
    if wrong:
        raise LayoutError(
            f"{checkpoint.root}: tensors do not fit config.json:\n  " + "\n  ".join(wrong[:10]),
            hint="the config belongs to another checkpoint, or the checkpoint is damaged",
        )
