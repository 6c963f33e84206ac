"""PyTorch Distributed Checkpoint: an inert reader of `.metadata` and `.distcp` files, and the plan of new ones."""

from ckpt_tools.formats.dcp.metadata import open_dcp
from ckpt_tools.formats.dcp.planner import plan_dcp

__all__ = ["open_dcp", "plan_dcp"]
