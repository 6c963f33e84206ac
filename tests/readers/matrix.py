"""Runs the reader matrix: sources by stock transformers, `ckpt convert` and `ckpt consolidate`, then every reader.

A cell is (reader, writer, case): the `writer` major of transformers saved the source checkpoint of `case`, and the
reader loads what `ckpt consolidate` made of it. Everything runs in subprocesses, as users run it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.readers.cases import CASES, LIMITS, NOT_RUN
from tests.readers.environments import python_for

HERE = Path(__file__).parent
WRITERS = ("transformers4", "transformers5")
READERS = ("transformers4", "transformers5", "vllm", "sglang")
TOLERANCE = 2e-5
"""Log-probabilities, FP32: readers order their sums differently; the largest difference measured is below 1e-5."""


@dataclass(frozen=True)
class Cell:
    reader: str
    writer: str
    case: str

    @property
    def limit(self) -> str | None:
        """Why the reader cannot serve this architecture, whoever wrote the checkpoint; None where it can."""
        return LIMITS.get((self.reader, self.case))


@dataclass(frozen=True)
class Finding:
    """One line of the published matrix."""

    reader: str
    version: str
    writer: str
    case: str
    max_abs_logprob_difference: float | None
    passed: bool
    limit: str | None


def cells(readers: Sequence[str], cases: Sequence[str]) -> list[Cell]:
    """Both writers for the two transformers majors; for the engines, which take long to start, the newer writer."""
    chosen = []
    for reader in readers:
        writers = WRITERS if reader in WRITERS else WRITERS[-1:]
        for writer in writers:
            asked = [case for case in cases if not {(reader, case), (writer, case)} & NOT_RUN.keys()]
            chosen += [Cell(reader, writer, case) for case in asked]
    return chosen


def interpreter(reader: str) -> Path:
    """The reader's Python; transformers 5 is the development environment."""
    return Path(sys.executable) if reader == "transformers5" else _built(reader)


@cache
def _built(reader: str) -> Path:
    return python_for(reader)


class Workshop:
    """Makes sources and their consolidated counterparts under `root`, each once, and asks readers about them."""

    def __init__(self, root: Path, cases: Sequence[str]) -> None:
        self.root = root
        self.cases = tuple(cases)
        self._reports: dict[Cell, dict[str, Any]] = {}
        self._written: set[str] = set()

    def source(self, cell: Cell) -> Path:
        """The stock checkpoint of a cell."""
        if cell.writer not in self._written:
            script = HERE / "make_checkpoints.py"
            known = [case for case in self.cases if (cell.writer, case) not in NOT_RUN]
            _run(interpreter(cell.writer), script, self.root / cell.writer, *known)
            self._written.add(cell.writer)
        return self.root / cell.writer / cell.case

    def reference(self, cell: Cell) -> Path:
        source = self.source(cell)
        return source.with_name(f"{source.name}.reference.safetensors")

    def consolidated(self, cell: Cell) -> Path:
        """The Hugging Face repository that our tools make from the cell's source by way of the native layout."""
        source = self.source(cell)
        native, output = (source.with_name(f"{source.name}.{kind}") for kind in ("native", "consolidated"))
        if not output.exists():
            _run(sys.executable, "-m", "ckpt_tools", "convert", source, native, "--quiet")
            _run(sys.executable, "-m", "ckpt_tools", "consolidate", native, output, "--quiet")
        return output

    def report(self, cell: Cell) -> dict[str, Any]:
        """The reader's report on the consolidated checkpoint; transformers checks a writer's cases at one start."""
        if cell not in self._reports:
            together = [cell]
            if cell.reader in WRITERS:
                together = [other for other in cells([cell.reader], self.cases) if other.writer == cell.writer]
            checkpoints = [self.consolidated(each) for each in together]
            self._reports |= zip(together, self.ask(together, checkpoints), strict=True)
        return self._reports[cell]

    def ask(self, asked: Sequence[Cell], checkpoints: Iterable[Path]) -> list[dict[str, Any]]:
        """Have one reader load each checkpoint and compare it with its cell's reference."""
        reader = asked[0].reader
        script = HERE / f"check_{'transformers' if reader in WRITERS else reader}.py"
        pairs = [path for cell, made in zip(asked, checkpoints, strict=True) for path in (made, self.reference(cell))]
        command = [str(part) for part in (interpreter(reader), script, *pairs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reports = [json.loads(line) for line in done.stdout.splitlines()]
        if len(reports) != len(asked):
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-4000:]}")
        return reports


def agrees(report: dict[str, Any]) -> bool:
    """Whether a report shows a complete load and the reference's log-probabilities, greedy tokens and token ids."""
    return not faults(report)


def faults(report: dict[str, Any]) -> list[str]:
    """What a report shows to be wrong, in words; empty when nothing is."""
    if not report["loaded"]:
        return [f"not loaded: {report['error']}"]
    found = [f"{kind}: {', '.join(report[kind])}" for kind in ("missing", "unexpected") if report[kind]]
    if not report["max_abs_logprob_difference"] <= TOLERANCE:
        found.append(f"log-probabilities differ by {report['max_abs_logprob_difference']:.2e}")
    if not report["greedy_equal"]:
        found.append(f"greedy tokens differ: {report['greedy']}")
    if not report["tokenizer_equal"]:
        found.append("the tokenizer gives other ids")
    return found


def finding(cell: Cell, report: dict[str, Any]) -> Finding:
    difference = report["max_abs_logprob_difference"]
    return Finding(
        reader=cell.reader,
        version=report["version"],
        writer=cell.writer,
        case=cell.case,
        max_abs_logprob_difference=None if difference is None or cell.limit else float(f"{difference:.1e}"),
        passed=agrees(report) and cell.limit is None,
        limit=cell.limit,
    )


def save(path: Path, findings: Sequence[Finding]) -> None:
    """Write the matrix as JSON, sorted, so that a rerun changes only what changed."""
    order = {case: index for index, case in enumerate(CASES)}
    rows = sorted(findings, key=lambda row: (order[row.case], READERS.index(row.reader), row.writer))
    document = {"tolerance": TOLERANCE, "cells": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stderr[-4000:]}")
