"""What a run measures: one JSON line a step in a file, one line on the terminal, and a report at the end."""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from automodel.logging import get_logger

_logger = get_logger(__name__)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        loss: mean over the target tokens of the global batch, before the update.
        grad_norm: global norm before clipping.
        lr: learning rate of the update.
        tokens: target tokens of the step.
        tokens_per_second: all input tokens of the global batch, over the time of the step.
        seconds: of the step, data included.
        max_memory_bytes: peak of this process so far: of the GPU's allocator, or resident where there is no GPU.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float
    seconds: float
    max_memory_bytes: int

    def line(self, steps: int) -> str:
        return (
            f"step {self.step}/{steps}  loss {self.loss:.4f}  grad norm {self.grad_norm:.3f}  lr {self.lr:.2e}  "
            f"{self.tokens_per_second:,.0f} tokens/s  {self.max_memory_bytes / 2**30:.2f} GiB"
        )


@dataclass(frozen=True)
class Report:
    """A finished run.

    Attributes:
        first_step: step that this process started with, counted from 1; later than 1 after a resume.
        steps: of the whole run.
        first_loss, last_loss: of those steps; None when there was nothing left to do.
        tokens: target tokens since the beginning of the run.
        seconds: of this process's steps.
        tokens_per_second: input tokens over those seconds.
        checkpoint: last one saved.
        export_dir: repository written at the end.
        model_class: that was trained.
        mesh: sizes of its axes.
    """

    first_step: int
    steps: int
    first_loss: float | None
    last_loss: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    checkpoint: str | None
    export_dir: str | None
    model_class: str
    mesh: dict[str, int]

    def lines(self) -> list[str]:
        losses = "" if self.first_loss is None else f", loss {self.first_loss:.4f} -> {self.last_loss:.4f}"
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one process"
        found = [
            f"trained {self.model_class} on {axes}: steps {self.first_step} to {self.steps}{losses}",
            f"{self.tokens:,} target tokens, {self.tokens_per_second:,.0f} tokens/s in {self.seconds:.1f} s",
        ]
        found += [f"checkpoint: {self.checkpoint}"] if self.checkpoint else []
        found += [f"Hugging Face repository: {self.export_dir}"] if self.export_dir else []
        return found


class MetricsFile:
    """`metrics.jsonl`: one line for each step, also after a resume from an earlier step.

    Args:
        path: of the file.
        from_step: steps after this one are removed, because they will be taken again.
    """

    def __init__(self, path: Path, from_step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= from_step]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)

    def append(self, metrics: StepMetrics) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")


def write_report(path: Path, report: Report) -> None:
    path.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


def max_memory_bytes() -> int:
    """Peak memory of this process; see `StepMetrics`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _lines(path: Path) -> list[str]:
    """Whole lines of the file; one that a kill cut short is not among them."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
