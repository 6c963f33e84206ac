"""The one sink for what the command line says: results on stdout, everything else on stderr.

Verbs hand over a report and the lines that show it to people; this module decides, from `--json` and `--quiet`, which
of them is written and where. Colour is used only for the words `error:` and `hint:`, on terminals that want it.
"""

from __future__ import annotations

import dataclasses
import json as json_module
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ckpt_tools.cli.text import printable

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from ckpt_tools.engine.execute import Progress

RED, CYAN = 31, 36


@dataclasses.dataclass(frozen=True)
class Output:
    """Where one run of the command writes.

    Attributes:
        json: one JSON object on stdout in place of lines for people.
        quiet: no progress, no hints and no summary of success.
        speaker: who says it, before each error, where several processes write to one place.
    """

    json: bool = False
    quiet: bool = False
    speaker: str = ""

    def show(self, report: DataclassInstance | Mapping[str, object], lines: Iterable[str]) -> None:
        """What the user asked to see; `--quiet` does not silence it."""
        if self.json:
            _write_json(report)
        else:
            for line in lines:
                sys.stdout.write(printable(line) + "\n")
        sys.stdout.flush()

    def done(self, report: DataclassInstance | Mapping[str, object], lines: Iterable[str]) -> None:
        """What an action did; with `--quiet` success is silent, and `--json` is always answered."""
        if self.json or not self.quiet:
            self.show(report, lines)

    def hint(self, text: str) -> None:
        """A next step, on stderr."""
        if not self.json and not self.quiet:
            self._stderr("hint: ", CYAN, text)

    def fail(self, message: str, hint: str | None, exit_code: int) -> None:
        """An error and the next step: on stderr, or as the JSON object on stdout."""
        if self.json:
            _write_json({"error": message, "hint": hint, "exit_code": exit_code})
            sys.stdout.flush()
            return
        self._stderr("error: ", RED, message, self.speaker)
        if hint:
            self._stderr("hint: ", CYAN, hint, self.speaker)

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """Shows bytes as they move, on stderr; None with `--quiet`."""
        if self.quiet:
            yield None
            return
        from ckpt_tools.cli.progress import Bars, Lines, Meter

        with Meter(Bars(sys.stderr) if _is_terminal(sys.stderr) else Lines(sys.stderr)) as meter:
            yield meter

    @staticmethod
    def _stderr(word: str, colour: int, text: str, speaker: str = "") -> None:
        if _is_terminal(sys.stderr) and not os.environ.get("NO_COLOR"):
            word = f"\033[1;{colour}m{word}\033[0m"
        sys.stderr.write(f"{speaker}{word}{printable(text)}\n")
        sys.stderr.flush()


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _write_json(report: DataclassInstance | Mapping[str, object]) -> None:
    document = report if isinstance(report, Mapping) else dataclasses.asdict(report)
    sys.stdout.write(json_module.dumps(document, default=_jsonable) + "\n")


def _jsonable(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
