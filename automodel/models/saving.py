"""What a model needs so that all processes of a mesh save it as a repository: where it came from, and the method.

Native models have it from their base class; transformers' own classes get it when they are sharded and the layout of
their family is known.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from automodel.logging import get_logger, log_once
from automodel.parallel.local import tensors_by_name
from automodel.sources import Location
from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.sizes import parse_size
from ckpt_tools.engine.checkpoint import read_config
from ckpt_tools.families import family_of
from ckpt_tools.layouts.layout import Layout

_logger = get_logger(__name__)
_UNSET_SAVE_ARGUMENTS: dict[str, tuple[object, ...]] = {
    "safe_serialization": (None, True),
    "push_to_hub": (None, False),
    "save_peft_format": (None, True),
    "save_original_format": (None, True),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights came from; empty for one that was made from a config.

    Attributes:
        root: directory of config, tokenizer and other side files.
        config: its config.json as it is on disk.
        generation_config: the generation config that was loaded, to see whether it was changed since.
    """

    root: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] | None = None


class RepositorySaving:
    """Mixed into a `PreTrainedModel`.

    Attributes:
        transformers_architecture: the class name that a saved config.json carries, so that any reader loads it.
        source: what `save_pretrained` starts from.
    """

    transformers_architecture: str
    source: ModelSource = ModelSource()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        is_main_process: bool = True,
        overwrite: bool = False,
        checkpointer: object | None = None,
        **unsupported: object,
    ) -> None:
        """Write a plain Hugging Face repository that transformers 4 and 5, vLLM and SGLang load.

        On a mesh all processes call this together, and each writes its own part; nothing is gathered.

        Args:
            save_directory: directory to make or to update, on a file system that all processes share.
            max_shard_size: tensor bytes of one file, `5GB` or a number.
            is_main_process: for an unsharded model, whether this process writes.
            overwrite: replace the directory whatever it holds.
            checkpointer: accepted where NeMo AutoModel takes one; none is needed.
            unsupported: other arguments of transformers' method; any that is set is refused.

        Raises:
            UsageError: an argument that has no meaning here.
            CkptError: the output exists with other files in it, does not fit on the disk, or cannot be written.
        """
        from automodel.models.export import export_repository, is_sharded

        refused = [name for name, value in unsupported.items() if value not in _UNSET_SAVE_ARGUMENTS.get(name, (None,))]
        if refused:
            raise UsageError(
                f"save_pretrained of {type(self).__name__} does not take {', '.join(refused)}",
                hint="save without them; `hf upload` publishes a directory",
            )
        if checkpointer is not None:
            log_once(_logger, logging.INFO, "save_pretrained needs no checkpointer; the one given is not used")
        if is_main_process or is_sharded(self):
            export_repository(
                self,
                Path(save_directory),
                source=self.source,
                architecture=self.transformers_architecture,
                max_shard_size=parse_size(max_shard_size),
                overwrite=overwrite,
            )
        self.config.architectures = [self.transformers_architecture]


def add_saving(model: PreTrainedModel) -> None:
    """Make `save_pretrained` of a transformers model write its part of a repository; before it is sharded."""
    kind = type(model)
    members = {"transformers_architecture": kind.__name__, "__module__": kind.__module__, "__doc__": kind.__doc__}
    model.__class__ = type(kind.__name__, (RepositorySaving, kind), members)


def attach_source(model: PreTrainedModel, location: Location) -> None:
    """Remember where the model came from, and take its generation config along."""
    model.name_or_path = model.config._name_or_path = location.repository or str(location.root)
    attach_files(model, location.side_root)


def attach_files(model: PreTrainedModel, side_root: Path) -> None:
    """Take along what `side_root` holds besides parameters, so that an export has it."""
    generation = None
    if model.can_generate() and (side_root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(side_root)
        generation = model.generation_config.to_dict()
    if isinstance(model, RepositorySaving):
        model.source = ModelSource(side_root, read_config(side_root), generation)


def layout_of(model: nn.Module, config: Mapping[str, Any]) -> Layout | None:
    """The layout of a model's family, seen from the names that the model has; None where none fits them.

    Args:
        model: native, or transformers' own; sharded or not.
        config: its config.json.
    """
    family = family_of(config)
    if family is None:
        return None
    names = tensors_by_name(model).keys()
    layout = family.layout(config, form="", names=names).of_names(names)
    return layout if layout.native.keys() == names else None
