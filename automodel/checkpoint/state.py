"""What a training checkpoint holds, as one flat dictionary of tensors, so that no entry needs a pickle.

- the model's tensors under their own names, so that the directory is itself a native checkpoint of the model;
- `optimizer.state.<parameter>.<key>`: the optimizer's tensors, sharded like the parameter;
- `train_state.json`: `TrainState` as UTF-8 JSON in a uint8 tensor;
- `train_state.rng.<global rank>.<generator>`: the generators of each rank of the job, as uint8 tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from automodel.parallel.local import tensors_by_name
from ckpt_tools.core.errors import FormatError

OPTIMIZER = "optimizer."
TRAIN_STATE = "train_state."
TRAIN_STATE_JSON = TRAIN_STATE + "json"


@dataclass(frozen=True)
class TrainState:
    """Where training stands; all that is needed besides the config to go on, on any mesh.

    Attributes:
        step: optimizer steps taken; the position in the data follows from it.
        tokens: target tokens trained on.
        seed: of the run.
        world_size: processes that saved.
        data_fingerprint: of the data and its order, so that a resume on other data is noticed.
    """

    step: int
    tokens: int
    seed: int
    world_size: int
    data_fingerprint: str

    def encode(self) -> torch.Tensor:
        """As UTF-8 JSON in a 1-d uint8 tensor."""
        return torch.frombuffer(bytearray(json.dumps(asdict(self), sort_keys=True).encode()), dtype=torch.uint8)

    @classmethod
    def decode(cls, data: torch.Tensor) -> TrainState:
        """The inverse of `encode`.

        Raises:
            FormatError: not such a JSON document.
        """
        try:
            body = json.loads(bytes(data.tolist()))
            return cls(**body)
        except (ValueError, TypeError) as error:
            raise FormatError(
                f"{TRAIN_STATE_JSON} of the checkpoint is not a training state: {error}",
                hint="the checkpoint was saved by another version or is damaged",
            ) from None


def model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors by name; a tied parameter once."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # After a forward pass without a backward pass FSDP2 leaves gathered copies in place.
            module.reshard()
    return {name: tensor.detach() for name, tensor in tensors_by_name(model).items()}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors by the parameter's name and their own; made first where a parameter has none yet."""
    make_optimizer_state(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{OPTIMIZER}state.{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


@torch.no_grad()
def make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that its first step would, without changing any value.

    Parameters that no gradient has reached yet, such as those of a rank without experts, have the same entries as on
    other ranks, and a fresh optimizer has tensors to load into.
    """
    for group in optimizer.param_groups:
        missing = [p for p in group["params"] if p not in optimizer.state and p.requires_grad]
        if not missing:
            continue
        # The optimizer itself knows best what its state is: one step without gradient, rate and decay makes it.
        single = type(optimizer)([{**group, "params": missing}])
        for inner in single.param_groups:
            inner.update(lr=torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0)
            inner["weight_decay"] = 0.0
        kept = [p.grad for p in missing]
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        single.step()
        for parameter, grad in zip(missing, kept, strict=True):
            parameter.grad = grad
            state = single.state[parameter]
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
            optimizer.state[parameter] = state


def rng_state() -> dict[str, torch.Tensor]:
    """This rank's generators, under names that hold its global rank."""
    prefix = f"{TRAIN_STATE}rng.{_global_rank()}."
    states = {prefix + "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[prefix + "cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: Mapping[str, torch.Tensor]) -> None:
    """Restore what `rng_state` gave; generators that are not in `states` are left alone."""
    prefix = f"{TRAIN_STATE}rng.{_global_rank()}."
    if (cpu := states.get(prefix + "cpu")) is not None:
        torch.set_rng_state(cpu.cpu())
    if (cuda := states.get(prefix + "cuda")) is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda.cpu())


def _global_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
