"""The memory of a training step, walked through moment by moment.

Not everything is there at once: activations shrink while gradients grow. The largest moment is the peak, as
`torch.cuda.max_memory_allocated` measures it; NCCL, CUDA itself, symmetric memory and what the allocator holds back
come on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from automodel.memory.activations import Activations
from automodel.memory.sizes import Sizes, Step
from automodel.memory.states import KEPT_GATHERED_BYTES, States
from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.names import nearest
from ckpt_tools.engine.sharding import ShardingMesh

OPTIMIZERS = {"adamw-bf16": 4, "adamw-fp32": 8, "none": 0}
"""Optimizer -> bytes of its states for each element of a parameter."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the process that holds most.

    Attributes:
        parameters, gradients, optimizer: what it holds of them, when all are there.
        gathered: parameters that FSDP2 has gathered when the head runs.
        activations: kept by all layers between forward and backward.
        peak: at the largest moment of a step.
        moment: which that is.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    peak: int
    moment: str


def estimate(
    config: Mapping[str, Any],
    mesh: ShardingMesh,
    step: Step,
    *,
    itemsize: int = 2,
    optimizer: str = "adamw-bf16",
    keeps: int = KEPT_GATHERED_BYTES,
) -> Memory:
    """The memory of a training step.

    Args:
        config: content of config.json.
        mesh: native experts are divided over `ep`; all else, and all of transformers', is sharded over all processes.
        itemsize: bytes of an element of parameters, gradients and activations.
        optimizer: one of `OPTIMIZERS`.
        keeps: bytes of gathered parameters up to which layers keep them from forward to backward.

    Raises:
        UsageError: the family's layers are not those of the formulas, there is no such optimizer, or the
            implementation has no such checkpointing.
    """
    if optimizer not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise UsageError(
            f"there is no optimizer {optimizer!r}", hint=f"did you mean {nearest(optimizer, OPTIMIZERS) or known}?"
        )
    if step.checkpointing == "selective" and step.implementation != "native":
        raise UsageError("selective checkpointing is of native layers", hint="give --checkpointing, or neither")
    sizes = Sizes.of(config, step, itemsize)
    if step.implementation != "native":
        mesh = ShardingMesh(dp_shard=mesh.ranks)
    states = States.of(config, mesh, itemsize, keeps)
    activations = Activations(sizes, mesh, step.implementation, step.checkpointing)
    optimizer_bytes = states.total // itemsize * OPTIMIZERS[optimizer]
    nbytes, moment = max((nbytes, moment) for moment, nbytes in _moments(states, activations))
    layers = len(states.held)
    return Memory(
        parameters=states.total,
        gradients=states.total,
        optimizer=optimizer_bytes,
        gathered=states.gathered(layers) + states.root_whole,
        activations=sum(activations.kept(layer) for layer in range(layers)),
        peak=states.total + optimizer_bytes + nbytes,
        moment=moment,
    )


def _moments(states: States, activations: Activations) -> Iterator[tuple[str, int]]:
    """(moment, bytes then beside parameters and optimizer) of a step."""
    layers = range(len(states.held))
    kept = [activations.kept(layer) for layer in layers]
    yield "head and loss", sum(kept) + states.gathered(len(layers)) + states.root_whole + activations.head
    gradients = activations.head_gradient
    for layer in reversed(layers):
        gradients += states.held[layer]
        nbytes = sum(kept[: layer + 1]) + activations.working(layer) + gradients + states.root_whole
        yield f"backward of layer {layer}", nbytes + states.gathered(layer + 1) + states.reducing(layer)
    # What is outside of the layers is reduced last, when the embedding has its gradient.
    yield "end of backward", states.total + 2 * states.root_whole
