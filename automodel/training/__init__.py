"""Training on a device mesh from one YAML file: `ckpt train CONFIG.yaml`, or `torchrun -m automodel.training`.

The config's keys are documented in `automodel.training.config`.
"""

from automodel.training.config import TrainingConfig, load_config
from automodel.training.loop import run
from automodel.training.metrics import Report

__all__ = ["Report", "TrainingConfig", "load_config", "run"]
