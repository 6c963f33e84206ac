"""The learning rate of each step: linear warm-up, then cosine, linear or no decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """Shape of the learning rate over the run.

    Attributes:
        warmup_steps: steps of linear growth from 0 to the peak.
        decay: what follows until the last step.
        final_ratio: learning rate of the last step, as a share of the peak (not for `constant`).
    """

    warmup_steps: int = 0
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final_ratio: float = 0.1


def lr_ratio(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Share of the peak learning rate that step `step` (0-based) of `total_steps` uses.

    A function of the step alone, so that a resumed run needs no state.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    span = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    fall = progress if config.decay == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - config.final_ratio) * fall
