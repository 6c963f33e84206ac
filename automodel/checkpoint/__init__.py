"""Training checkpoints: sharded saves and loads through torch's distributed checkpoint (DCP)."""

from automodel.checkpoint.directory import latest_checkpoint, step_directory
from automodel.checkpoint.load import load_checkpoint
from automodel.checkpoint.save import Background, save_checkpoint
from automodel.checkpoint.saver import AsyncSave, Saver
from automodel.checkpoint.state import TrainState

__all__ = [
    "AsyncSave",
    "Background",
    "Saver",
    "TrainState",
    "latest_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
    "step_directory",
]
