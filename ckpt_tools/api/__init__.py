"""What the verbs of the command line do, as functions with the same parameters, returning dataclasses.

    from ckpt_tools import convert, consolidate, verify

Nothing is printed here and nothing exits. Every function raises `ckpt_tools.CkptError` when the input, the machine or
the arguments are at fault, and an output that could not be completed does not appear.
"""

from __future__ import annotations

from ckpt_tools.api.checking import roundtrip, verify
from ckpt_tools.api.copying import consolidate, convert, plan
from ckpt_tools.api.diagnosis import (
    CheckpointReport,
    Diagnosis,
    GpuReport,
    LayerReport,
    ModelReport,
    Problem,
    ToolsReport,
    TrainingReport,
    examine_checkpoint,
    examine_tools,
)
from ckpt_tools.api.looking import diff, explain, inspect, list_families
from ckpt_tools.api.reports import CopyReport, FamilyReport, InspectReport, RoundtripReport, VerifyReport
from ckpt_tools.engine.ranks import join_ranks

__all__ = [
    "CheckpointReport",
    "CopyReport",
    "Diagnosis",
    "FamilyReport",
    "GpuReport",
    "InspectReport",
    "LayerReport",
    "ModelReport",
    "Problem",
    "RoundtripReport",
    "ToolsReport",
    "TrainingReport",
    "VerifyReport",
    "consolidate",
    "convert",
    "diff",
    "examine_checkpoint",
    "examine_tools",
    "explain",
    "inspect",
    "join_ranks",
    "list_families",
    "plan",
    "roundtrip",
    "verify",
]
