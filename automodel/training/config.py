"""The training config: frozen dataclasses filled from a YAML file, in which every key has to be known.

The docstrings of these classes are the reference of the file format.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from automodel.checkpoint import AsyncSave
from automodel.memory.sizes import Checkpointing
from automodel.parallel.mesh import MeshConfig
from automodel.training.optimizer import OptimizerConfig
from automodel.training.schedule import ScheduleConfig
from ckpt_tools.core.errors import NotFoundError, UsageError
from ckpt_tools.core.names import nearest

DtypeName = Literal["float32", "bfloat16", "float16"]
T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained.

    Attributes:
        source: Hugging Face directory, native checkpoint, or `org/name` on the Hub.
        revision: of a Hub repository.
        dtype: of the parameters and of the optimizer's state.
        compute_dtype: of forward and backward, such as `bfloat16` over `float32` parameters; null is `dtype`.
        reduce_dtype: in which gradients are added up between processes; null is `dtype`.
        attn_implementation: `sdpa` or `eager`; null lets the model choose.
        backend: kernels, as `NeMoAutoModelForCausalLM` takes it.
        random_init: take only the config from the source, and random parameters.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them: `true` those
            of whole layers, `selective` those between a layer's input and its attention, in native models.
    """

    source: str
    revision: str | None = None
    dtype: DtypeName = "float32"
    compute_dtype: DtypeName | None = None
    reduce_dtype: DtypeName | None = None
    attn_implementation: str | None = None
    backend: str | dict[str, str] = "auto"
    random_init: bool = False
    activation_checkpointing: Checkpointing = False


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on; exactly one of `files` and `dataset`.

    Attributes:
        files: text files (one document each) or `.jsonl` files with `text` or `messages` on each line.
        dataset: name or path for `datasets.load_dataset`, with rows that have `text` or `messages`.
        dataset_split: its split.
        seq_len: tokens of a training sequence; documents are packed into them and attend only to themselves.
        loss_on: of `messages`, the tokens that count: those of the assistant, or all.
        shuffle: another order in each epoch; false keeps the order of the files.
        cache_dir: where tokens are kept between runs; null is `data-cache` in the output directory.
    """

    files: tuple[Path, ...] = ()
    dataset: str | None = None
    dataset_split: str = "train"
    seq_len: int = 2048
    loss_on: Literal["assistant", "all"] = "assistant"
    shuffle: bool = True
    cache_dir: Path | None = None


@dataclass(frozen=True)
class CheckpointConfig:
    """When training state is saved, and what a run starts from.

    Attributes:
        every: steps between saves; 0 saves only at the end.
        at_end: save after the last step.
        keep_last: older checkpoints are deleted; null keeps all.
        async_save: `auto` lets training go on on CUDA while a checkpoint is written from copies in host memory, `on` on
            the CPU too; `off` waits, as a run does at its end and where there is not enough host memory.
        resume: `auto` goes on from the newest checkpoint in the output directory if there is one; `none` starts anew
            and refuses a directory that has checkpoints; anything else is the path of a checkpoint.
    """

    every: int = 0
    at_end: bool = True
    keep_last: int | None = None
    async_save: AsyncSave = "auto"
    resume: str = "auto"


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run.

    Attributes:
        model, data, mesh, optimizer, schedule, checkpoint: see their classes.
        output_dir: checkpoints, metrics and report.
        steps: optimizer steps of the whole run, those before a resume included.
        global_batch_size: sequences of one step, over all processes.
        micro_batch_size: sequences of one forward pass of one process.
        max_grad_norm: gradients are scaled down to this global norm; null does not clip.
        seed: of the order of the data and of all random numbers.
        export_dir: a Hugging Face repository is written there at the end; null does not export.
        sync_gradients: `every` micro-batch reduces its gradients (little memory), or only the `last` one of a step
            does (little communication; each process keeps gradients of all parameters).
        cuda_graphs: `auto` runs micro-batches as a CUDA graph where that can be done (a native model, rows of one
            document each, experts on the GPUs of one host), `off` launches kernels one by one.
        timeout_minutes: after which a process that waits for another gives up.
    """

    model: ModelConfig
    data: DataConfig
    output_dir: Path
    steps: int
    global_batch_size: int
    micro_batch_size: int = 1
    max_grad_norm: float | None = 1.0
    seed: int = 0
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export_dir: Path | None = None
    sync_gradients: Literal["every", "last"] = "every"
    cuda_graphs: Literal["auto", "off"] = "auto"
    timeout_minutes: float = 30.0


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The config in a YAML file, with `section.key=value` overrides (values in YAML) applied.

    Raises:
        NotFoundError: no such file.
        UsageError: not YAML, an unknown or missing key, or a value of the wrong kind; keys come with the nearest name.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist", hint="give the path of a training config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a mapping of keys to values", hint="see examples/ for a config to start from")
    for override in overrides:
        _apply(document, override)
    config = parse(TrainingConfig, document, "")
    _check(config)
    return config


def parse(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls`; `where` is the path of its section, for messages.

    Raises:
        UsageError: an unknown or missing key, or a value of the wrong kind.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    types_of = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            close = nearest(str(key), known)
            hint = f"did you mean {where}{close}?" if close else f"known keys: {', '.join(known)}"
            raise UsageError(f"the config has no key {where}{key}", hint=hint)
    missing = [
        where + name
        for name, f in known.items()
        if name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise UsageError(f"the config lacks {', '.join(missing)}")
    return cls(**{key: _convert(types_of[key], value, where + key) for key, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`, one of the annotations used above."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [argument for argument in arguments if argument is not type(None)]
        for choice in choices[:-1]:
            try:
                return _convert(choice, value, where)
            except UsageError:
                continue
        return _convert(choices[-1], value, where)
    if origin is Literal:
        if isinstance(value, bool):
            # YAML 1.1 reads on and off, without quotes, as these.
            value = "on" if value else "off"
        if value not in arguments:
            close = nearest(str(value), map(str, arguments))
            hint = f"did you mean {close}?" if close else None
            raise UsageError(f"{where} is {value!r}, not one of {', '.join(map(str, arguments))}", hint=hint)
        return value
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise UsageError(f"{where} is {value!r}, not a list of {len(arguments)} values")
        return tuple(_convert(arguments[0], item, where) for item in items)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise UsageError(f"{where} is {value!r}, not a section with keys")
        return parse(kind, value, where + ".")  # type: ignore[arg-type]
    return _plain(kind, origin, value, where)


def _plain(kind: Any, origin: Any, value: Any, where: str) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-5, without a dot, as text.
        try:
            return float(value)
        except ValueError:
            pass
    expected = origin or kind
    if isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        return value
    name = "path" if kind is Path else expected.__name__
    raise UsageError(f"{where} is {value!r}, not of type {name}")


def _apply(document: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"{override!r} is not an override", hint="write it as section.key=value, such as steps=100")
    *sections, key = path.split(".")
    for section in sections:
        inner = document.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{override!r}: {section} is not a section of the config")
        document = inner
    try:
        document[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{override!r}: the value is not YAML: {error}") from None


def _check(config: TrainingConfig) -> None:
    if bool(config.data.files) == bool(config.data.dataset):
        raise UsageError("data needs exactly one of files and dataset")
    positive = {
        "steps": config.steps,
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": config.micro_batch_size,
        "data.seq_len": config.data.seq_len,
    }
    for name, value in positive.items():
        if value < 1:
            raise UsageError(f"{name} is {value}, and has to be 1 or more")
    if config.checkpoint.keep_last is not None and config.checkpoint.keep_last < 1:
        raise UsageError("checkpoint.keep_last has to be 1 or more, or null to keep all")
