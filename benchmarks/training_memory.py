"""The memory that `automodel.memory` predicts for the rows of `benchmarks/training.py`."""

from __future__ import annotations

import argparse

from training_cases import CASES, OURS

from automodel.memory import Memory, Step, estimate
from automodel.memory.sizes import Checkpointing, Implementation
from ckpt_tools.core.errors import UsageError
from ckpt_tools.engine.sharding import ShardingMesh

_PEERS: dict[str, Implementation] = {
    "transformers": "transformers",
    "transformers-compiled": "transformers-compiled",
    "transformers-flex-compiled": "transformers-compiled",
}
"""Other implementations that there are formulas for."""

PEERS_KEEP = 40 << 30
"""Bytes of parameters up to which other implementations keep layers gathered from forward to backward."""


def predicted(arguments: argparse.Namespace, implementation: str, ep: int, batch: str) -> Memory | None:
    """Of one row; None where there is no formula for it.

    Args:
        batch: sequences of a micro-batch, as `parsed` takes it.
    """
    kind = "native" if implementation in OURS else _PEERS.get(implementation)
    if kind is None:
        return None
    size, checkpointing = parsed(batch)
    step = Step(size, arguments.sequence, checkpointing, kind)
    try:
        mesh = ShardingMesh(arguments.gpus // ep, ep)
        if kind == "native":
            return estimate(CASES[arguments.case], mesh, step)
        return estimate(CASES[arguments.case], mesh, step, keeps=PEERS_KEEP)
    except UsageError:
        return None


def parsed(batch: str) -> tuple[int, Checkpointing]:
    """Sequences of a micro-batch, and its activation checkpointing, of `4`, `4c` (whole layers) or `4s` (selective)."""
    return int(batch.rstrip("cs")), "selective" if batch.endswith("s") else batch.endswith("c")


def suffix(checkpointing: Checkpointing) -> str:
    """What `parsed` knows it by."""
    return "s" if checkpointing == "selective" else "c" if checkpointing else ""


def print_predictions(arguments: argparse.Namespace, runs: list[tuple[str, int]]) -> None:
    """A table of all rows that a run would have."""
    print(f"{arguments.case} on {arguments.gpus} GPUs, sequence {arguments.sequence:,}: GiB of each GPU, predicted")
    print(f"{'implementation':28}{'ep':>3}{'mb':>4}{'states':>9}{'activations':>13}{'gathered':>10}{'peak':>8}  at")
    for implementation, ep in runs:
        for batch in arguments.micro_batches.split(","):
            memory = predicted(arguments, implementation, ep, batch)
            begin = f"{implementation:28}{ep:>3}{batch:>4}"
            if memory is None:
                print(f"{begin}  no formula")
                continue
            states = memory.parameters + memory.gradients + memory.optimizer
            print(
                f"{begin}{gib(states):>9}{gib(memory.activations):>13}{gib(memory.gathered):>10}{gib(memory.peak):>8}"
                f"  {memory.moment}"
            )


def gib(nbytes: int) -> float:
    """Rounded as the tables have it."""
    return round(nbytes / 2**30, 1)
