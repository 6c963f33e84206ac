"""What `ckpt doctor` reports, and the part of it that needs no training half: this machine's tools, and a checkpoint.

The rest is found by `automodel.doctor`, which returns `TrainingReport` and `ModelReport`.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_tools.core.errors import CkptError
from ckpt_tools.core.packages import EXTRAS, NEEDED, PackageReport, look_for
from ckpt_tools.engine.checkpoint import config_of, has_weights, open_checkpoint
from ckpt_tools.engine.execute import default_threads
from ckpt_tools.engine.place import Place, examine_place
from ckpt_tools.engine.verify import verify_structure
from ckpt_tools.families import family_of
from ckpt_tools.formats.hub import is_url, resolve_source
from ckpt_tools.formats.remote import by_url
from ckpt_tools.version import TOOL


@dataclass(frozen=True)
class Problem:
    """An error that the doctor found and went on after; the fields are those of any error with `--json`."""

    error: str
    hint: str | None
    exit_code: int

    @classmethod
    def of(cls, error: CkptError) -> Problem:
        return cls(error.message, error.hint, error.exit_code)


@dataclass(frozen=True)
class ToolsReport:
    """What the checkpoint tools have here.

    Attributes:
        tool: name and version.
        python: its version.
        system: kernel and processor.
        processors: number of them.
        threads: that a copy takes by default.
        packages: that the tools need.
        extras: packages that let them do more.
        place: where outputs go.
    """

    tool: str
    python: str
    system: str
    processors: int
    threads: int
    packages: tuple[PackageReport, ...]
    extras: tuple[PackageReport, ...]
    place: Place


@dataclass(frozen=True)
class CheckpointReport:
    """Whether a checkpoint is whole, from its headers.

    Attributes:
        path: as it was given.
        root: its directory on this machine, or its URL.
        family: name of its family, `identity` where there is none.
        title: of the family, else the config's `model_type`.
        format: `safetensors`, `dcp`, ...; empty where there are no weights, or they cannot be opened.
        form: of quantised weights, such as `fp8`; empty for plain ones.
        tensors: that its family's layout has for its config, else that it holds.
        nbytes: of the weights.
        checks: what was found in order, in words.
        problem: why it is not whole, None where it is or has no weights.
    """

    path: str
    root: str
    family: str
    title: str
    format: str = ""
    form: str = ""
    tensors: int = 0
    nbytes: int = 0
    checks: tuple[str, ...] = ()
    problem: Problem | None = None


@dataclass(frozen=True)
class GpuReport:
    """One accelerator: its name, its compute capability, such as `9.0`, and its memory in bytes."""

    name: str
    capability: str
    memory: int


@dataclass(frozen=True)
class LayerReport:
    """What runs one kind of layer.

    Attributes:
        layer: the kind.
        count: of such layers in the model; None where no model is asked about.
        kernel: that runs with `backend="auto"`.
        reason: why no faster one does, empty where it is the fastest.
    """

    layer: str
    count: int | None
    kernel: str
    reason: str


@dataclass(frozen=True)
class TrainingReport:
    """What training has here.

    Attributes:
        versions: of Python packages and of CUDA's libraries, by name.
        gpus: that torch sees.
        obstacle: why it sees none, empty where it does.
        packages: that bring faster kernels.
        device: that layers run on.
        dtype: that they are looked at in.
        layers: every kind of layer, with shapes that all kernels take.
        next_steps: commands that would bring faster kernels, or a GPU to torch.
    """

    versions: dict[str, str]
    gpus: tuple[GpuReport, ...]
    obstacle: str
    packages: tuple[PackageReport, ...]
    device: str
    dtype: str
    layers: tuple[LayerReport, ...]
    next_steps: tuple[str, ...]


@dataclass(frozen=True)
class ModelReport:
    """What would run a model.

    Attributes:
        implementation: class of the model.
        native: it is one of ours, not transformers'.
        reason: why not, empty where it is.
        parameters: number of them.
        device: that it would run on.
        dtype: of its parameters.
        layers: its kinds of layers.
        next_steps: commands that would bring faster kernels.
    """

    implementation: str
    native: bool
    reason: str
    parameters: int
    device: str
    dtype: str
    layers: tuple[LayerReport, ...]
    next_steps: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        tools: what the checkpoint tools have.
        training: what training has; None where it cannot run.
        checkpoint: of MODEL; None where none was given.
        model: what would run MODEL; None where nothing can, or none was given.
        problems: why training, MODEL's weights or its training do not work.
    """

    tools: ToolsReport
    training: TrainingReport | None
    checkpoint: CheckpointReport | None
    model: ModelReport | None
    problems: tuple[Problem, ...]


def examine_tools(path: str | Path = ".") -> ToolsReport:
    """What the checkpoint tools have on this machine, and in a directory that outputs go to; leaves nothing there.

    Raises:
        StorageError: the directory cannot be looked at.
    """
    return ToolsReport(
        TOOL,
        platform.python_version(),
        f"{platform.system()} {platform.release()} {platform.machine()}",
        os.cpu_count() or 1,
        default_threads(),
        look_for(NEEDED),
        look_for(EXTRAS),
        examine_place(Path(path)),
    )


@by_url
def examine_checkpoint(path: str | Path) -> CheckpointReport:
    """Whether a checkpoint is whole, from its headers; no value is read.

    Args:
        path: any checkpoint, or a directory with a config.json and no weights, or that file. Of a Hub repository
            config.json alone is fetched.

    Raises:
        NotFoundError: there is nothing there.
    """
    name = str(path)
    resolved = resolve_source(name, weights=False)
    is_file = resolved.path.is_file()
    root = resolved.path.parent if is_file else resolved.path
    report = CheckpointReport(name, name if is_url(name) else str(root), "identity", "")
    try:
        config = config_of(root)
        family = family_of(config)
        report = replace(report, title=str(config.get("model_type") or ""))
        if family is not None:
            report = replace(report, family=family.name, title=family.title)
        if config and (is_file or resolved.repository is not None or not has_weights(root)):
            tensors = 0 if family is None else len(family.layout(config).leaves)
            return replace(report, tensors=tensors, checks=("config.json alone: there are no weights to check",))
        checkpoint = open_checkpoint(root)
        found = verify_structure(checkpoint)
    except CkptError as error:
        return replace(report, problem=Problem.of(error))
    return replace(
        report,
        format=checkpoint.store.kind,
        form=checkpoint.layout.form if checkpoint.is_encoded else "",
        tensors=found.tensors,
        nbytes=found.nbytes,
        checks=tuple(found.done),
    )
