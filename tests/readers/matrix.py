"""Runs the reader matrix: sources by stock transformers, `ckpt convert` and `ckpt consolidate`, then every reader.

A cell is (reader, writer, case): the `writer` major of transformers saved the source checkpoint of `case`, and the
reader loads what `ckpt consolidate` made of it. Everything runs in subprocesses, as users run it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ckpt_tools.families.readers import READERS as KNOWN_READERS
from ckpt_tools.families.readers import Limit, limits
from tests.readers.cases import CASES, EXPORTS, FORMS, LIMITS, NO_KERNEL, NOT_RUN, OPTIONS
from tests.readers.environments import python_for

HERE = Path(__file__).parent
WRITERS = ("transformers4", "transformers5")
READERS = tuple(KNOWN_READERS)
ALL_CASES = (*CASES, *EXPORTS)
TOLERANCE = 2e-5
"""Log-probabilities, FP32: readers order their sums differently; the largest difference measured is below 1e-5."""


@dataclass(frozen=True)
class Cell:
    reader: str
    writer: str
    case: str

    @property
    def runs(self) -> bool:
        """Whether the case is made by the writer, and asked of the reader or known to be refused by it."""
        made = (self.writer, self.source_case) not in NOT_RUN
        return made and ((self.reader, self.case) not in NOT_RUN or self.refusal is not None)

    @property
    def source_case(self) -> str:
        return EXPORTS.get(self.case, self.case)

    @property
    def form(self) -> str:
        """The quantised form of the files that the reader is shown, empty for plain ones."""
        return FORMS.get(self.case, "")

    @property
    def refusal(self) -> Limit | None:
        """What `ckpt consolidate --for` says of this reader and this checkpoint."""
        return next(iter(limits(CASES[self.source_case], (self.reader,), self.form)), None)

    @property
    def limit(self) -> str | None:
        """Why the reader cannot serve this checkpoint, whoever wrote it; None where it can."""
        known = LIMITS.get((self.reader, self.case))
        return known or (self.refusal.reason if self.refusal else None)

    @property
    def stands_in(self) -> str | None:
        """Why the files are compared with the published ones, not the answers with the source's; None where not."""
        return None if self.limit else NO_KERNEL.get((self.reader, self.form))

    @property
    def note(self) -> str | None:
        """What has to be said with the reader's answers."""
        if self.limit:
            remedied = self.refusal is not None and self.refusal.instead is not None
            return f"`--for {self.reader}` writes one that it reads" if remedied else None
        return OPTIONS.get((self.reader, self.case), (None, None))[1]

    @property
    def options(self) -> dict[str, Any]:
        return OPTIONS.get((self.reader, self.case), ({}, ""))[0]


@dataclass(frozen=True)
class Finding:
    """One line of the published matrix.

    Attributes:
        proof: `logits` where the reader's answers were compared, `values` where only the files were.
        note: what has to be said with it.
    """

    reader: str
    version: str | None
    writer: str
    case: str
    proof: str
    max_abs_logprob_difference: float | None
    passed: bool
    limit: str | None
    note: str | None


def cells(readers: Sequence[str], cases: Sequence[str]) -> list[Cell]:
    """Both writers for the two transformers majors; for the engines, which take long to start, the newer writer."""
    chosen = []
    for reader in readers:
        writers = WRITERS if reader in WRITERS else WRITERS[-1:]
        chosen += [cell for writer in writers for case in cases if (cell := Cell(reader, writer, case)).runs]
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
        self.sources = tuple(dict.fromkeys(EXPORTS.get(case, case) for case in cases))
        self._reports: dict[Cell, dict[str, Any]] = {}
        self._written: set[str] = set()

    def source(self, cell: Cell) -> Path:
        """The stock checkpoint of a cell."""
        if cell.writer not in self._written:
            script = HERE / "make_checkpoints.py"
            made = [case for case in self.sources if (cell.writer, case) not in NOT_RUN]
            _run(interpreter(cell.writer), script, self.root / cell.writer, *made)
            self._written.add(cell.writer)
        return self.root / cell.writer / cell.source_case

    def reference(self, cell: Cell) -> Path:
        source = self.source(cell)
        return source.with_name(f"{source.name}.reference.safetensors")

    def consolidated(self, cell: Cell) -> Path:
        """The Hugging Face repository that our tools make from the cell's source by way of the native layout."""
        output = self.source(cell).with_name(f"{cell.case}.consolidated")
        if not output.exists():
            # An export is BF16; as FP32, which holds the same values, every reader computes in FP32.
            form = ("--quantize", cell.form) if cell.form else ("--dtype", "float32") if cell.case in EXPORTS else ()
            _run(sys.executable, "-m", "ckpt_tools", "consolidate", self._native(cell), output, *form, "--quiet")
        return output

    def consolidated_for_its_reader(self, cell: Cell) -> Path:
        """The same with `--for` the cell's reader."""
        output = self.source(cell).with_name(f"{cell.case}.for-{cell.reader}")
        _run(sys.executable, "-m", "ckpt_tools", "consolidate", self._native(cell), output, "--for", cell.reader)
        return output

    def _native(self, cell: Cell) -> Path:
        source = self.source(cell)
        native = source.with_name(f"{source.name}.native")
        if not native.exists():
            _run(sys.executable, "-m", "ckpt_tools", "convert", source, native, "--dequantize", "--quiet")
        return native

    def differences(self, cell: Cell) -> list[str]:
        """Names of the tensors whose dtype, shape or bytes are not the source's in what we wrote."""
        ours, theirs = (_tensors(path) for path in (self.consolidated(cell), self.source(cell)))
        return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))

    def report(self, cell: Cell) -> dict[str, Any]:
        """The reader's report on the consolidated checkpoint; transformers checks a writer's cases at one start."""
        if cell not in self._reports:
            together = (
                [each for each in cells([cell.reader], self.cases) if each.writer == cell.writer]
                if cell.reader in WRITERS
                else [cell]
            )
            together = [each for each in together if each.stands_in is None]
            checkpoints = [self.consolidated(each) for each in together]
            self._reports |= zip(together, self.ask(together, checkpoints), strict=True)
        return self._reports[cell]

    def ask(
        self, asked: Sequence[Cell], checkpoints: Sequence[Path], *, with_options: bool = True
    ) -> list[dict[str, Any]]:
        """Have one reader load each checkpoint and compare it with its cell's reference."""
        reader = asked[0].reader
        script = HERE / f"check_{'transformers' if reader in WRITERS else reader}.py"
        pairs = [path for cell, made in zip(asked, checkpoints, strict=True) for path in (made, self.reference(cell))]
        options = {str(made): cell.options for cell, made in zip(asked, checkpoints, strict=True) if with_options}
        command = [str(part) for part in (interpreter(reader), script, *pairs, "--options", json.dumps(options))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        reports = [json.loads(line) for line in done.stdout.splitlines()]
        if len(reports) != len(asked):
            raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-4000:]}")
        return reports


def _tensors(repository: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor of a one-file repository: a length, a JSON header, then bytes."""
    data = (repository / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], data[start + begin : start + end])
    return found


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
    """What a reader's answers proved."""
    difference = report["max_abs_logprob_difference"]
    return Finding(
        reader=cell.reader,
        version=report["version"],
        writer=cell.writer,
        case=cell.case,
        proof="logits",
        max_abs_logprob_difference=None if difference is None or cell.limit else float(f"{difference:.1e}"),
        passed=agrees(report) and cell.limit is None,
        limit=cell.limit,
        note=cell.note,
    )


def finding_of_values(cell: Cell, differences: Sequence[str]) -> Finding:
    """What comparing the files proved, where the reader could not be asked."""
    return Finding(cell.reader, None, cell.writer, cell.case, "values", None, not differences, None, cell.stands_in)


def save(path: Path, findings: Sequence[Finding]) -> None:
    """Write the matrix as JSON, sorted, so that a rerun changes only what changed."""
    order = {case: index for index, case in enumerate(ALL_CASES)}
    rows = sorted(findings, key=lambda row: (order[row.case], READERS.index(row.reader), row.writer))
    document = {"tolerance": TOLERANCE, "cells": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stderr[-4000:]}")
