"""Saving a model whose layout is known as a plain Hugging Face repository, from one process or a mesh.

Each process writes the bytes that it holds into the final files. The directory appears only when it is whole; one
that is there is replaced in one step, and only if nothing in it would be lost.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from automodel.models.saving import ModelSource, layout_of
from automodel.parallel.agree import raise_together
from automodel.parallel.local import LocalBox, host_bytes, local_boxes, tensors_by_name
from ckpt_tools.core.dtypes import BY_TORCH_NAME
from ckpt_tools.core.errors import OutputExistsError, listed
from ckpt_tools.engine.memory import Box, RepositoryExport
from ckpt_tools.formats import hf

_GENERATION_CONFIG = "generation_config.json"
_STAGING_BYTES = 256 << 20
_REPLACED = frozenset({"config.json", "ckpt-manifest.json"})


def export_repository(
    model: PreTrainedModel,
    directory: Path,
    *,
    source: ModelSource,
    architecture: str,
    max_shard_size: int,
    overwrite: bool,
) -> None:
    """Write `model` to `directory`; on a mesh all processes call this together.

    Files of an existing directory other than weights and config (a tokenizer saved before, for example) stay; where
    there are none, those of the repository that the model was loaded from are copied.

    Args:
        model: native, or transformers' own class of a family with a layout.
        directory: to make or to update.
        source: where the model came from.
        architecture: the class name that config.json carries.
        max_shard_size: bytes of tensor data in one file.
        overwrite: replace the directory whatever it holds.

    Raises:
        OutputExistsError: the directory holds something that replacing it would lose, and `overwrite` is not set.
        CkptError: the disk is full, another run writes there, or another process failed.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward pass alone FSDP2 leaves gathered copies, perhaps of a narrower dtype, in place.
            module.reshard()
    sharded = is_sharded(model)
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not sharded and not first:
        return
    # Without a mesh a script may well call this on its first process alone: no collectives then.
    together: Callable[[str], AbstractContextManager[None]] = raise_together if sharded else lambda _: nullcontext()
    prepared = False
    with tempfile.TemporaryDirectory(prefix="automodel-export-") as side_files:
        try:
            with together("preparing the repository"):
                if first:
                    _collect_side_files(model, source, directory, Path(side_files), overwrite)
                config = repository_config(model, source, architecture)
                export = _export(model, config, source, directory, max_shard_size, Path(side_files))
                if first:
                    export.prepare()
                    prepared = True
            with together("writing the repository"), torch.no_grad():
                for group in _groups(owned_boxes(model)):
                    export.write(group)
            with together("completing the repository"):
                if first:
                    export.commit()
                    prepared = False
        finally:
            if prepared:
                export.abort()


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are divided over a mesh."""
    return isinstance(model, FSDPModule) or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def owned_boxes(model: nn.Module) -> Iterator[LocalBox]:
    """The parts of the model that this process writes: of copies that several processes hold, the first one's."""
    tensors = tensors_by_name(model)
    for box in local_boxes(model):
        tensor = tensors[box.name]
        if isinstance(tensor, DTensor):
            coordinate = tensor.device_mesh.get_coordinate() or ()
            copies = [c for c, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()]
            if any(copies):
                continue
        elif dist.is_initialized() and dist.get_rank() != 0:
            continue
        yield box


def repository_config(model: PreTrainedModel, source: ModelSource, architecture: str) -> dict[str, object]:
    """The config.json to write: the one that the model was loaded with, updated with the model's own fields."""
    current = json.loads(model.config.to_json_string(use_diff=False))
    current.pop("_name_or_path", None)
    return {**source.config, **current, "architectures": [architecture]}


def _export(
    model: PreTrainedModel,
    config: dict[str, object],
    source: ModelSource,
    directory: Path,
    max_shard_size: int,
    side_files: Path,
) -> RepositoryExport:
    layout = layout_of(model, config)
    if layout is None:
        raise TypeError(f"{type(model).__name__} has no layout in ckpt_tools.families")
    dtypes = {name: BY_TORCH_NAME[str(t.dtype).removeprefix("torch.")] for name, t in tensors_by_name(model).items()}
    return RepositoryExport(
        layout,
        config,
        directory,
        dtypes=dtypes,
        max_shard_size=max_shard_size,
        side_files_from=side_files,
        # What replacing loses was looked for before.
        overwrite=True,
        source={"path": str(source.root)} if source.root else {},
    )


def _collect_side_files(
    model: PreTrainedModel, source: ModelSource, directory: Path, folder: Path, overwrite: bool
) -> None:
    """Fill `folder` with the side files that the repository will have, and its generation config."""
    kept = hf.side_files(directory) if directory.is_dir() and not overwrite else ()
    if directory.exists() and not overwrite:
        _refuse_loss(directory, kept)
    root = directory if kept else source.root
    names = kept or (hf.side_files(root) if root is not None else ())
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(hf.SideFile(root, name).read())
    if _GENERATION_CONFIG not in names or model.generation_config.to_dict() != source.generation_config:
        (folder / _GENERATION_CONFIG).unlink(missing_ok=True)
        model.generation_config.save_pretrained(folder)


def _refuse_loss(directory: Path, kept: tuple[str, ...]) -> None:
    """Raise if `directory` holds anything but what an export writes again."""
    safe = {*kept, *_REPLACED}
    names = [] if not directory.is_dir() else (str(path.relative_to(directory)) for path in _files(directory))
    lost = [
        name for name in names if name not in safe and not name.endswith((".safetensors", ".safetensors.index.json"))
    ]
    if lost or not directory.is_dir():
        raise OutputExistsError(
            f"{directory} exists, and saving would remove from it:\n{listed(lost)}"
            if lost
            else f"{directory} is a file",
            hint="choose another directory, or pass overwrite=True",
        )


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in sorted(directory.rglob("*")) if path.is_symlink() or not path.is_dir())


def _groups(boxes: Iterator[LocalBox]) -> Iterator[list[Box]]:
    group: list[Box] = []
    used = 0
    for box in boxes:
        if group and used + box.tensor.nbytes > _STAGING_BYTES:
            yield group
            group, used = [], 0
        data = host_bytes(box.tensor.contiguous().cpu())
        group.append(Box(box.name, box.offsets, tuple(box.tensor.shape), box.dtype, data))
        used += box.tensor.nbytes
    if group:
        yield group
