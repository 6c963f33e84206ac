"""How much memory of a GPU a training step needs, from config and mesh alone: no torch, no files, no GPU."""

from automodel.memory.estimate import Memory, estimate
from automodel.memory.sizes import Step

__all__ = ["Memory", "Step", "estimate"]
