"""The model of a run: where its files are, and building it on the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import xxhash
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from automodel.auto import NeMoAutoModelForCausalLM, count_predict_layers
from automodel.models import NativeCausalLM
from automodel.models.saving import attach_files
from automodel.parallel.local import tensors_by_name
from automodel.parallel.mesh import MixedPrecision, ParallelMesh
from automodel.sources import locate
from automodel.tokenizer import NeMoAutoTokenizer
from automodel.training.config import ModelConfig
from ckpt_tools.core.errors import FormatError, UsageError
from ckpt_tools.engine.checkpoint import open_checkpoint, read_config
from ckpt_tools.engine.manifest import read_manifest
from ckpt_tools.families import family_of
from ckpt_tools.formats.hf import SideFile, side_files
from ckpt_tools.layouts.layout import Side


@dataclass(frozen=True)
class Source:
    """The files that a run starts from.

    Attributes:
        root: directory of the tensors.
        side_root: directory of config.json and tokenizer.
        family: name of the layout, `identity` for architectures without a native one.
        origin: what it is, for the manifests of checkpoints; that of a converted or saved one is where it came from.
    """

    root: Path
    side_root: Path
    family: str
    origin: dict[str, str]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return NeMoAutoTokenizer.from_pretrained(str(self.side_root))

    def tokenizer_digest(self) -> str:
        """xxh3-128 of the tokenizer's files and chat template."""
        digest = xxhash.xxh3_128()
        for name, data in self.side_files().items():
            if "token" in name or "template" in name or "vocab" in name or "merges" in name:
                digest.update(name.encode() + b"\n" + data)
        return digest.hexdigest()

    def side_files(self) -> dict[str, bytes]:
        """config.json, tokenizer and other side files, byte for byte."""
        names = dict.fromkeys(("config.json", *side_files(self.side_root)))
        return {name: SideFile(self.side_root, name).read() for name in names}


def open_source(source: str | Path, revision: str | None) -> Source:
    """Find a repository or native checkpoint; one of the Hub is downloaded.

    Raises:
        NotFoundError: it does not exist.
        FormatError: it has no config.json.
    """
    location = locate(source, revision=revision, options={})
    config = read_config(location.side_root)
    if not config:
        raise FormatError(f"{location.side_root} has no config.json", hint="it is needed to build the model")
    family = family_of(config)
    manifest = read_manifest(location.root)
    origin = {"model": location.repository or str(source)}
    if revision is not None:
        origin["revision"] = revision
    if manifest is not None and manifest.source:
        origin = manifest.source
    return Source(location.root, location.side_root, family.name if family else "identity", origin)


@contextmanager
def files_kept(source: Source) -> Iterator[Source]:
    """The source with its side files in a temporary directory, where they stay whatever becomes of the source."""
    with TemporaryDirectory(prefix="ckpt-train-") as folder:
        for name, data in source.side_files().items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        yield replace(source, side_root=Path(folder))


def build_model(
    config: ModelConfig, source: Source, mesh: ParallelMesh, device: torch.device, *, values: bool
) -> PreTrainedModel:
    """The model, sharded over `mesh`.

    Args:
        mesh: with the dtypes of `mixed_precision`; a single process that computes in the parameters' own dtype has
            nothing to shard or cast, and takes the model as it is.
        device: of this process.
        values: read the parameters from the source (unless the config asks for random ones); without, they are
            random until a checkpoint is loaded.
    """
    dtype: torch.dtype = getattr(torch, config.dtype)
    arguments: dict[str, object] = {
        "dtype": dtype,
        "backend": config.backend,
    }
    plain = mesh.world_size == 1 and config.compute_dtype in (None, config.dtype)
    arguments |= {"device": device} if plain else {"device_mesh": mesh}
    if config.attn_implementation is not None:
        arguments["attn_implementation"] = config.attn_implementation
    if values and not config.random_init:
        model = NeMoAutoModelForCausalLM.from_pretrained(str(source.root), **arguments)
    else:
        if not values:
            # The model of the checkpoint that is loaded next.
            arguments["predict_layers"] = count_predict_layers(open_checkpoint(source.root))
        model = NeMoAutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(source.side_root)), **arguments)
        attach_files(model, source.side_root)
    if config.activation_checkpointing == "selective":
        if not isinstance(model, NativeCausalLM):
            raise UsageError(
                f"{type(model).__name__} has no selective activation checkpointing, which is of native models",
                hint="set model.activation_checkpointing to true or false",
            )
        model.selective_checkpointing_enable()
    elif config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def held_side(model: PreTrainedModel) -> Side:
    """The side of its family's layout that a model holds; `native` where no layout is known, as everywhere else."""
    config = model.config.to_dict()
    family, names = family_of(config), tensors_by_name(model).keys()
    return "native" if family is None else family.layout(config, form="", names=names).side_of(names)


def mixed_precision(config: ModelConfig) -> MixedPrecision:
    """The config's dtypes of computation."""
    return MixedPrecision(_dtype(config.compute_dtype), _dtype(config.reduce_dtype))


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
