"""The repository that a run leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from automodel.logging import get_logger
from automodel.models.saving import RepositorySaving, add_saving, attach_files, layout_of
from automodel.parallel.agree import is_first, raise_together
from automodel.training.model import Source
from ckpt_tools.core.storage import storage_errors

_logger = get_logger(__name__)


def export_model(model: PreTrainedModel, source: Source, directory: Path) -> None:
    """Write a Hugging Face repository with the tokenizer of `source`. All processes call it together.

    A model whose layout is known, native or not, is written in parts by all processes. Any other of transformers' own
    classes is gathered into the host memory of the first process: its class alone knows the names that its files have.

    Raises:
        CkptError: the directory exists, or cannot be written; raised on all processes.
    """
    if not isinstance(model, RepositorySaving) and layout_of(model, model.config.to_dict()) is not None:
        add_saving(model)
        attach_files(model, source.side_root)
    if isinstance(model, RepositorySaving):
        model.save_pretrained(str(directory))
        return
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with raise_together(f"exporting to {directory}"):
        if is_first():
            _save_gathered(model, state, source, directory)


def _save_gathered(model: PreTrainedModel, state: dict[str, torch.Tensor], source: Source, directory: Path) -> None:
    staging = directory.with_name(f".{directory.name}.exporting")
    with storage_errors("write", directory):
        shutil.rmtree(staging, ignore_errors=True)
        model.save_pretrained(staging, state_dict=state)
        for name, data in source.side_files().items():
            path = staging / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        staging.rename(directory)
