"""What the demos share: show each command before running it, stop at the first that fails, end with a table."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
"""Where this environment's commands are: `ckpt`, `torchrun` and `python`."""


@dataclass(frozen=True)
class Check:
    what: str
    passed: bool
    result: str


class Stopped(Exception):
    """A step failed, so those after it cannot run; its check is already in the table."""


class Walkthrough:
    """A demo in progress: its console, its output folder and what has been checked."""

    def __init__(self, title: str, out: Path) -> None:
        self.console = Console(highlight=False)
        self.out = out
        self.checks: list[Check] = []
        self._started = time.perf_counter()
        self._title = title

    def step(self, title: str) -> None:
        """Announce the next part."""
        self.console.print()
        self.console.rule(f"[bold]{title}", align="left")

    def run(self, what: str, *command: str | Path, echo: bool = True) -> str:
        """Show a command, run it from the project's root, and check that it exits with 0; returns its stdout.

        Its stdout is shown too unless `echo` is false. Raises Stopped when the command fails.
        """
        typed = [_relative(part) for part in command]
        shown = shlex.join(typed)
        self.console.print(f"[bold cyan]$ {shown}", soft_wrap=True)
        started = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with subprocess.Popen(typed, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
            lines = []
            for line in process.stdout or ():
                lines.append(line)
                if echo:
                    self.console.out(line, end="", highlight=False)
        seconds = time.perf_counter() - started
        result = f"{seconds:.1f} s" if process.returncode == 0 else f"exit code {process.returncode}"
        self.check(what, process.returncode == 0, result)
        if process.returncode:
            raise Stopped(shown)
        return "".join(lines)

    def check(self, what: str, passed: bool, result: str) -> None:
        """Note one result for the table at the end."""
        self.checks.append(Check(what, passed, result))

    def finish(self) -> int:
        """Print the table; returns the exit code."""
        table = Table(
            title=f"{self._title}: what was checked", title_justify="left", title_style="bold", pad_edge=False
        )
        table.add_column("check")
        table.add_column("result")
        table.add_column("")
        for check in self.checks:
            table.add_row(check.what, check.result, "[green]passed" if check.passed else "[bold red]FAILED")
        self.console.print()
        self.console.print(table)
        failed = sum(not check.passed for check in self.checks)
        seconds = time.perf_counter() - self._started
        kept = f"{len(self.checks) - failed} passed, {failed} failed, in {seconds:.0f} s. Everything is in {self.out}/."
        self.console.print(kept, style="green" if failed == 0 else "bold red")
        return 1 if failed else 0


def play(walkthrough: Walkthrough, scenario: Callable[[Walkthrough], None]) -> int:
    """Run a demo to its end, or to the first command that fails; returns the exit code."""
    try:
        scenario(walkthrough)
    except Stopped as stopped:
        walkthrough.console.print(f"\n[bold red]Stopped:[/] this command failed: {stopped}", soft_wrap=True)
    return walkthrough.finish()


def _relative(part: str | Path) -> str:
    """A path inside the project as it is typed from the project's root."""
    text = str(part)
    return text.removeprefix(f"{ROOT}{os.sep}")
