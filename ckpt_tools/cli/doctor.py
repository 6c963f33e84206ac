"""`ckpt doctor`: what this machine can do, and whether a model can be trained on it.

A second verb that reaches the training half, as `ckpt train` does: by name, when it runs, if torch is there.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_tools.cli import options
from ckpt_tools.cli.output import Output
from ckpt_tools.cli.text import aligned, counted
from ckpt_tools.cli.training_half import require_packages
from ckpt_tools.core.errors import CkptError
from ckpt_tools.core.sizes import format_size

if TYPE_CHECKING:
    from ckpt_tools.api.diagnosis import (
        CheckpointReport,
        Diagnosis,
        LayerReport,
        ModelReport,
        Problem,
        ToolsReport,
        TrainingReport,
    )
    from ckpt_tools.core.packages import PackageReport

EXAMPLES = ("ckpt doctor", "ckpt doctor --path /scratch", "ckpt doctor ./Qwen3-30B-A3B --json")


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Check that this model can be trained: a repository, a native checkpoint, or a config.json. "
            "Default: look at the machine alone.",
        ),
    ] = None,
    path: Annotated[
        str,
        typer.Option("--path", metavar="DIRECTORY", help="Where outputs would go. Example: --path /scratch"),
    ] = ".",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what this machine can do, and what would run a model.

    For each kind of layer it says which kernel runs, why not a faster one, and what installs that. Of MODEL headers
    alone are read. Exits with 0 when what was asked about works: training without torch is an error only for MODEL.
    """
    _require_tools()
    from ckpt_tools import api

    out = Output(json, quiet)
    problems: list[Problem] = []
    tools = api.examine_tools(path)
    checkpoint = None if model is None else api.examine_checkpoint(model)
    if checkpoint is not None and checkpoint.problem is not None:
        problems.append(checkpoint.problem)
    training = running = None
    # What libraries print while they are imported joins the log.
    with contextlib.redirect_stdout(sys.stderr), _noted(problems, api.Problem.of):
        half = _training_half()
        training = half.examine_training()
        running = None if checkpoint is None else half.examine_model(checkpoint.root)
    found = api.Diagnosis(tools, training, checkpoint, running, tuple(problems))
    out.show(found, _lines(found))
    if model is None or not problems:
        return
    if not json:
        for problem in problems:
            out.fail(problem.error, problem.hint, problem.exit_code)
    raise typer.Exit(problems[0].exit_code)


def _require_tools() -> None:
    """Refuses before anything is imported that would fail with a traceback."""
    from ckpt_tools.core.packages import NEEDED, is_found

    missing = [package for package in NEEDED if not is_found(package.module)]
    if missing:
        raise CkptError(
            f"ckpt needs {' and '.join(package.name for package in missing)}, which this Python does not have",
            hint=f"{sys.executable} -m pip install {missing[0].install}",
        )


def _training_half() -> ModuleType:
    require_packages()
    try:
        return import_module("automodel.doctor")
    except Exception as error:
        # A broken or mixed-up installation raises anything: ImportError, OSError, RuntimeError, AttributeError.
        raise CkptError(
            f"training cannot run: {type(error).__name__}: {error}",
            hint=f"{sys.executable} -m pip install --force-reinstall 'nemo-automodel-ckpt[train]'",
        ) from error


@contextlib.contextmanager
def _noted(problems: list[Problem], problem_of: Callable[[CkptError], Problem]) -> Iterator[None]:
    """Adds an error from inside to the problems, and goes on behind."""
    try:
        yield
    except CkptError as error:
        problems.append(problem_of(error))


def _lines(found: Diagnosis) -> Iterator[str]:
    yield from _tools(found.tools)
    if found.training is not None:
        yield ""
        yield from _training(found.training, layers=found.checkpoint is None)
    elif found.checkpoint is None:
        # With MODEL this is an error, and said as such.
        yield from ("", *(line for problem in found.problems for line in (problem.error, f"  {problem.hint}")))
    if found.checkpoint is not None:
        yield ""
        yield from aligned([*_weights(found.checkpoint), *_running(found.model)])
    if found.model is not None:
        yield ""
        yield from _layers(found.model.layers)
        yield from _next_steps(found.model.next_steps)


def _tools(tools: ToolsReport) -> Iterator[str]:
    place = tools.place
    room = f"{format_size(place.free)} of {format_size(place.total)} free"
    rows = [
        ("ckpt", f"{tools.tool.split()[-1]} on Python {tools.python}, {tools.system}"),
        ("packages", ", ".join(f"{package.name} {package.version}" for package in tools.packages)),
        ("threads", f"{tools.threads} by default, {counted(tools.processors, 'processor')}"),
        ("outputs", f"{place.path}: {f'{place.file_system}, ' if place.file_system else ''}{room}"),
    ]
    if place.obstacle:
        rows.append(("", f"nothing can be written there: {place.obstacle}"))
    else:
        sharing = "copies share disk blocks" if place.shares_blocks else "files share no disk blocks: copies move bytes"
        behind = "writes behind (RWF_DONTCACHE)" if place.writes_behind else "writes plainly, without RWF_DONTCACHE"
        rows += [("", sharing), ("", behind)]
    yield from aligned(rows)
    yield ""
    yield from _packages(tools.extras, installs=True)


def _packages(packages: Iterable[PackageReport], *, installs: bool) -> list[str]:
    rows = [("package", "version", "for")]
    for package in packages:
        how = f" ({package.install})" if installs and package.version is None else ""
        rows.append((package.name, package.version or "not installed", package.purpose + how))
    return aligned(rows)


def _training(training: TrainingReport, *, layers: bool) -> Iterator[str]:
    rows = [("training", ", ".join(f"{name} {version}" for name, version in training.versions.items()))]
    for gpu, count in Counter(training.gpus).items():
        times = f"{count} x " if count > 1 else ""
        rows.append(("GPUs", f"{times}{gpu.name}, compute capability {gpu.capability}, {format_size(gpu.memory)}"))
    if training.obstacle:
        rows.append(("GPUs", f"none: {training.obstacle}"))
    yield from aligned(rows)
    yield ""
    yield from _packages(training.packages, installs=False)
    if layers:
        yield ""
        yield f'what backend="auto" runs, in {training.dtype} on {training.device}'
        yield from _layers(training.layers)
        yield from _next_steps(training.next_steps)


def _weights(checkpoint: CheckpointReport) -> Iterator[tuple[str, str]]:
    names = "identity: tensors keep their names" if checkpoint.family == "identity" else checkpoint.family
    yield "model", checkpoint.path
    yield "family", f"{checkpoint.title or 'unknown'} ({names})"
    if checkpoint.format:
        form = f", {checkpoint.form}" if checkpoint.form else ""
        yield "weights", f"{checkpoint.format}{form}, {format_size(checkpoint.nbytes)}"
    for check in checkpoint.checks:
        yield "", check
    if checkpoint.problem is not None:
        yield "weights", "not whole"


def _running(model: ModelReport | None) -> Iterator[tuple[str, str]]:
    if model is None:
        yield "runs", "no: it cannot be trained here"
        return
    yield "runs", model.implementation + (", native" if model.native else ", transformers' own class")
    if model.reason:
        yield "", model.reason
    yield "", f"{counted(model.parameters, 'parameter')} in {model.dtype} on {model.device}"


def _layers(layers: Iterable[LayerReport]) -> list[str]:
    rows = [("layer", "count", "runs", "why not faster")]
    rows += [
        (row.layer, "" if row.count is None else f"{row.count:,}", row.kernel, row.reason or "-") for row in layers
    ]
    # What is not about a model has nothing to count.
    return aligned(rows) if any(row[1] for row in rows[1:]) else aligned((row[0], *row[2:]) for row in rows)


def _next_steps(steps: Sequence[str]) -> Iterator[str]:
    if steps:
        yield from ("", "next steps", *(f"  {step}" for step in steps))
