"""`ckpt estimate`: the memory that a training step takes of each GPU, from a config and a mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ckpt_tools.cli import options
from ckpt_tools.cli.output import Output
from ckpt_tools.cli.text import aligned
from ckpt_tools.core.errors import NotFoundError, UsageError

EXAMPLES = (
    "ckpt estimate ./Qwen3-30B-A3B --mesh ep=4 --batch 4",
    "ckpt estimate ./Qwen3-30B-A3B --mesh dp_shard=2,ep=4 --optimizer adamw-fp32 --checkpointing --json",
)


class Optimizer(str, Enum):
    """Optimizers, with the dtype of their states."""

    ADAMW_BF16 = "adamw-bf16"
    ADAMW_FP32 = "adamw-fp32"
    NONE = "none"


class Implementation(str, Enum):
    """Whose layers run."""

    NATIVE = "native"
    TRANSFORMERS = "transformers"
    TRANSFORMERS_COMPILED = "transformers-compiled"


def estimate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Checkpoint or directory with its config.json. Example: ./Qwen3-30B-A3B"),
    ],
    mesh: Annotated[
        str | None,
        typer.Option(
            "--mesh",
            help="Axes of the training mesh. Default: one process. Example: --mesh dp_shard=2,ep=4",
            autocompletion=options.complete_mesh,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Sequences of a process's micro-batch. Example: --batch 4")
    ] = 1,
    sequence: Annotated[
        int, typer.Option("--sequence", min=1, help="Tokens of a sequence. Example: --sequence 8192")
    ] = 4096,
    optimizer: Annotated[
        Optimizer, typer.Option("--optimizer", help="Optimizer and dtype of its states. Example: --optimizer none")
    ] = Optimizer.ADAMW_BF16,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Layers run again in the backward pass. Example: --checkpointing"),
    ] = False,
    selective_checkpointing: Annotated[
        bool,
        typer.Option(
            "--selective-checkpointing",
            help="What lies between a layer's input and its attention runs again. Example: --selective-checkpointing",
        ),
    ] = False,
    implementation: Annotated[
        Implementation,
        typer.Option("--implementation", help="Whose layers run. Example: --implementation transformers-compiled"),
    ] = Implementation.NATIVE,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Estimate the memory of a training step on each GPU.

    For parameters in BF16, from config.json alone: what torch calls the peak of allocated memory. What CUDA, NCCL and
    the allocator take comes on top.
    """
    from ckpt_tools.engine.sharding import ShardingMesh, parse_mesh

    # By name, because the tools are checked without the training half; this part of it needs no torch.
    memory = import_module("automodel.memory")
    axes = ShardingMesh() if mesh is None else parse_mesh(mesh)
    if checkpointing and selective_checkpointing:
        raise UsageError("--checkpointing and --selective-checkpointing exclude each other", hint="give one of them")
    again = "selective" if selective_checkpointing else checkpointing
    step = memory.Step(batch, sequence, again, implementation.value)
    found = memory.estimate(_config(Path(model)), axes, step, optimizer=optimizer.value)
    report = {"model": model, "mesh": str(axes), **asdict(step), "optimizer_states": optimizer.value, **asdict(found)}
    Output(json, quiet).show(report, _lines(report, axes.ranks))


def _config(model: Path) -> Mapping[str, Any]:
    """config.json of a repository, or of what training wrote, which has it in `hf/`."""
    from ckpt_tools.engine.checkpoint import read_config

    found = read_config(model) or read_config(model / "hf")
    if not found:
        raise NotFoundError(f"{model} has no config.json", hint="give a directory that has one; no tensor is needed")
    return found


def _lines(report: Mapping[str, Any], ranks: int) -> Iterator[str]:
    where = f"of each of {ranks} GPUs, at: " if ranks > 1 else "at: "
    meanings = {
        "parameters": "held by a process",
        "gradients": "when all are there",
        "optimizer": "states",
        "gathered": "parameters of other processes, when the head runs",
        "activations": "kept by all layers from forward to backward",
        "peak": where + report["moment"],
    }
    yield from aligned([(name, f"{report[name] / 2**30:.2f} GiB", text) for name, text in meanings.items()], right={1})
