"""`ckpt train`: distributed training from one YAML file, by the training half, which is imported when it runs."""

from __future__ import annotations

import contextlib
import json as json_module
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_tools.cli import options
from ckpt_tools.cli.failures import TerminationSignal, sigterm_left_alone
from ckpt_tools.cli.ranks import output
from ckpt_tools.cli.training_half import require_packages
from ckpt_tools.core.errors import CkptError, NotFoundError, UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

EXAMPLES = (
    "ckpt train train.yaml",
    "ckpt train train.yaml --nproc-per-node 8 --set mesh.ep=4 --set steps=20",
    "torchrun --nnodes 4 --nproc-per-node 8 ... -m ckpt_tools train train.yaml",
)


STDERR = 2
"""Descriptor of standard error."""

_ENDING = (signal.SIGINT, signal.SIGTERM)


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run. Example: train.yaml")],
    nproc_per_node: Annotated[
        int | None,
        typer.Option(
            "--nproc-per-node",
            min=1,
            help="Start this many processes on this machine under torchrun. Default: train in this process. "
            "Example: --nproc-per-node 8",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one value of the config; dots go into sections. May be repeated. "
            "Example: --set optimizer.lr=1e-4",
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train on a device mesh, resume, and export a repository.

    One YAML file describes the run. A rerun resumes at the last save, on the same mesh or another one. Steps are logged
    on stderr and in metrics.jsonl. Needs torch and transformers: pip install 'nemo-automodel-ckpt[train]'.
    """
    changes = overrides or []
    _check(config, changes)
    # What training and its libraries print joins the log; with --json stdout carries the report alone.
    with contextlib.redirect_stdout(sys.stderr):
        if nproc_per_node is None:
            report: DataclassInstance | Mapping[str, object] = _train_here(config, changes, quiet)
        else:
            report = _train_under_torchrun(config, changes, nproc_per_node, quiet, report=json)
    # The log ends with the report's lines, so there is nothing more to say to people.
    output(json, quiet).done(report, ())


class TrainingFailed(CkptError):
    """The processes of torchrun ended badly; what they said is on stderr."""

    def __init__(self, exit_code: int) -> None:
        hint = "the first error above is that of the rank that failed"
        super().__init__(f"training ended with exit code {exit_code}", hint=hint)
        self.exit_code = exit_code


def _check(config: str, overrides: Sequence[str]) -> None:
    """Refuses what is wrong before torch is imported or a process is started."""
    require_packages()
    if not os.path.isfile(config):
        raise NotFoundError(f"there is no config {config}", hint="examples/ holds some to start from")
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not key or not equals:
            raise UsageError(f"--set {override!r} is not KEY=VALUE", hint="example: --set optimizer.lr=1e-4")


def _train_here(config: str, overrides: Sequence[str], quiet: bool) -> DataclassInstance:
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    # Training saves before it ends, and says itself how it did.
    with sigterm_left_alone():
        report: DataclassInstance = import_module("automodel.training").run(config, list(overrides))
    return report


def _train_under_torchrun(
    config: str, overrides: Sequence[str], processes: int, quiet: bool, *, report: bool
) -> Mapping[str, object]:
    """Runs this verb in each of the processes; the content of report.json if `report`.

    Raises:
        TrainingFailed: torchrun ended with another exit code than 0; 128 and the number of a signal that ended it.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "ckpt_tools", "train", config]
    command += [text for override in overrides for text in ("--set", override)]
    with _signals_held() as release:
        child = subprocess.Popen([*command, *(["--quiet"] if quiet else [])], stdout=STDERR)
        try:
            release()
            code = child.wait()
        except KeyboardInterrupt as signalled:
            if isinstance(signalled, TerminationSignal):
                child.terminate()
            # The terminal has sent Ctrl-C to torchrun too. It passes a signal on, and ends after its processes.
            child.wait()
            raise
    if code:
        raise TrainingFailed(code if code > 0 else 128 - code)
    return _written_report(config, overrides) if report else {}


@contextlib.contextmanager
def _signals_held() -> Iterator[Callable[[], None]]:
    """Signals that ask to end wait until the function given is called, or the block ends.

    One that comes while a process is being started would leave behind a process that nobody knows.
    """
    came: list[int] = []
    # What is ignored stays so, also in the process that is started.
    before = {number: handler for number in _ENDING if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda came_now, _: came.append(came_now))

    def release() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()
        if came:
            first = came[0]
            came.clear()
            signal.raise_signal(first)

    try:
        yield release
    finally:
        release()


def _written_report(config: str, overrides: Sequence[str]) -> Mapping[str, object]:
    output: Path = import_module("automodel.training").load_config(Path(config), list(overrides)).output_dir
    written: dict[str, object] = json_module.loads((output / "report.json").read_text(encoding="utf-8"))
    return written
