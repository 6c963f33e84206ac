"""What every reader's check script shares: the reference it is held to, the comparison, and the JSON line it prints.

The scripts run in each reader's own environment, so this module needs numpy and safetensors only. A reference file
(safetensors) holds `input_ids` I64 [B, S], `logits` F32 [B, S, V], `greedy` I64 [B, T] and, in its metadata, a text
with the token ids that the source's tokenizer gives for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


@dataclass(frozen=True)
class Reference:
    """What stock transformers computed in FP32 from the source checkpoint."""

    input_ids: np.ndarray
    """I64 [B, S]."""
    logits: np.ndarray
    """F32 [B, S, V]: next-token logits at every position."""
    greedy: np.ndarray
    """I64 [B, T]: tokens generated after each full prompt, at temperature 0."""
    text: str
    text_ids: list[int]

    def save(self, path: Path) -> None:
        arrays = {"input_ids": self.input_ids, "logits": self.logits, "greedy": self.greedy}
        metadata = {"text": self.text, "text_ids": json.dumps(self.text_ids)}
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata=metadata)

    @staticmethod
    def load(path: Path) -> Reference:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            arrays = {name: file.get_tensor(name) for name in ("input_ids", "logits", "greedy")}
        return Reference(**arrays, text=metadata["text"], text_ids=json.loads(metadata["text_ids"]))

    def log_probabilities(self) -> np.ndarray:
        """F64 [B, S, V]."""
        return log_softmax(self.logits)


@dataclass(frozen=True)
class Report:
    """What one reader made of one checkpoint; `None` where the reader does not say."""

    reader: str
    version: str
    checkpoint: str = ""
    loaded: bool = False
    missing: list[str] | None = None
    unexpected: list[str] | None = None
    max_abs_logprob_difference: float | None = None
    greedy: list[list[int]] = field(default_factory=list)
    greedy_equal: bool = False
    tokenizer_equal: bool = False
    error: str | None = None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """F64, over the last dimension."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def max_difference(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> float:
    """The largest absolute difference; infinity as soon as one value is not finite, so that NaN never passes."""
    worst = 0.0
    for got, want in pairs:
        difference = float(np.abs(got - want).max())
        worst = max(worst, difference if np.isfinite(difference) else float("inf"))
    return worst


def tokenizer_agrees(checkpoint: Path, reference: Reference) -> bool:
    """Whether the checkpoint's tokenizer, loaded by this environment's transformers, gives the source's token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(reference.text).input_ids
    return ids == reference.text_ids


Check = Callable[[Report, Path, Reference, dict[str, Any]], Report]


def run(blank: Report, check: Check) -> int:
    """Check every CHECKPOINT REFERENCE pair of the command line; one JSON line each on stdout, all else on stderr."""
    parser = argparse.ArgumentParser(description=f"Load checkpoints with {blank.reader}; compare with references.")
    parser.add_argument("pairs", nargs="+", type=Path, metavar="CHECKPOINT REFERENCE")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: CHECKPOINT -> the reader's own options")
    arguments = parser.parse_args()
    pairs: list[Path] = arguments.pairs
    if len(pairs) % 2:
        parser.error("each CHECKPOINT needs its REFERENCE")
    failures = 0
    for checkpoint, reference in zip(pairs[::2], pairs[1::2], strict=True):
        started = replace(blank, checkpoint=str(checkpoint))
        options = arguments.options.get(str(checkpoint), {})
        with _stdout_to_stderr():
            try:
                report = check(started, checkpoint, Reference.load(reference), options)
            except Exception as error:  # a reader may refuse a checkpoint in any way: that is the finding
                traceback.print_exc()
                report = replace(started, error=f"{type(error).__name__}: {error}".strip())
        failures += report.error is not None
        print(json.dumps(asdict(report)), flush=True)
    return 1 if failures else 0


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send what engines and their native libraries print on file descriptor 1 to stderr."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
