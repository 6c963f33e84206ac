"""Loading a training checkpoint on the same mesh or another: DCP reshards, each rank reads its own rows."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from automodel.checkpoint.collective import dcp_call
from automodel.checkpoint.reader import InertReader
from automodel.checkpoint.state import (
    OPTIMIZER,
    TRAIN_STATE,
    TRAIN_STATE_JSON,
    TrainState,
    model_state,
    optimizer_state,
    set_rng_state,
)
from automodel.parallel.agree import raise_together
from automodel.parallel.local import boxes_of, poison, prove_written
from ckpt_tools.core.errors import FormatError, LayoutError, listed


def load_checkpoint(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Restore model, optimizer and this rank's generators from a checkpoint. All ranks call it together.

    Args:
        directory: a checkpoint that `save_checkpoint` wrote.
        model: with memory for its tensors; the values are replaced.
        optimizer: over the model's parameters; its hyperparameters stay those of the config.

    Returns:
        Where training stood. The generators are restored when as many processes resume as saved.

    Raises:
        LayoutError: tensors of model or optimizer are not those of the checkpoint, or parts of them are not in it.
        FormatError: the directory is not a training checkpoint.
    """
    with raise_together(f"opening {directory}"):
        reader = InertReader(directory)
        names = reader.description.tensors.keys()
        if TRAIN_STATE_JSON not in names:
            raise FormatError(
                f"{directory} holds a model but no training state",
                hint="give it as the model's source to start from it",
            )
        wanted = {**model_state(model), **optimizer_state(model, optimizer)}
        own = {name for name in names if not name.startswith(TRAIN_STATE)}
        _require_same(wanted, own, reader, directory)
        for name in names - own:
            wanted[name] = torch.empty(reader.shape(name), dtype=reader.dtype(name))
    own_boxes = list(boxes_of({name: wanted[name] for name in own}))
    for box in own_boxes:
        poison(box.tensor)
    with dcp_call(f"loading {directory}") as no_dist:
        dcp.load(wanted, storage_reader=reader, no_dist=no_dist)
    with raise_together(f"checking what was loaded from {directory}"):
        # DCP itself does not notice a chunk that is described nowhere.
        prove_written(own_boxes)
    state = TrainState.decode(wanted[TRAIN_STATE_JSON])
    if state.world_size == (dist.get_world_size() if dist.is_initialized() else 1):
        set_rng_state(wanted)
    return state


def _require_same(wanted: dict[str, torch.Tensor], there: set[str], reader: InertReader, directory: Path) -> None:
    """Names, shapes and dtypes of this run are those of the checkpoint."""
    lost, extra = sorted(wanted.keys() - there), sorted(there - wanted.keys())
    other = [
        f"{name} is {str(reader.dtype(name)).removeprefix('torch.')} {list(reader.shape(name))} there, "
        f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} here"
        for name, tensor in wanted.items()
        if name in there and (reader.shape(name), reader.dtype(name)) != (tuple(tensor.shape), tensor.dtype)
    ]
    faults = [
        f"{len(names):,} {what}:\n{listed(names)}"
        for names, what in (
            (lost, "tensors of this run are not in it"),
            (extra, "of its tensors are not in this run"),
            (other, "tensors differ"),
        )
        if names
    ]
    if faults:
        optimizer_only = not other and all(name.startswith(OPTIMIZER) for name in (*lost, *extra))
        hint = "resume with the optimizer that saved it" if optimizer_only else "the checkpoint is of another model"
        raise LayoutError(f"{directory} cannot be resumed:\n" + "\n".join(faults), hint=hint)
