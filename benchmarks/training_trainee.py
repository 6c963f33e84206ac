"""What `benchmarks/training.py` times: a model of one implementation on its devices, with optimizer and step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import training_peers
import training_weights
from training_cases import CASES, OURS
from training_memory import PEERS_KEEP
from transformers import AutoConfig, PreTrainedModel

from automodel import MeshConfig
from automodel.backends import Backend
from automodel.checkpoint.state import make_optimizer_state
from automodel.memory.sizes import Checkpointing
from automodel.models import NATIVE_MODELS, NativeCausalLM
from automodel.parallel.fsdp import parallelize
from automodel.parallel.materialize import allocate
from automodel.parallel.mesh import ParallelMesh
from automodel.training.data import Batch, to_device
from automodel.training.optimizer import OptimizerConfig, build_optimizer
from automodel.training.step import step_graph, train_step
from automodel.training.step_graph import StepGraph
from ckpt_tools.core.errors import UsageError

MAX_GRAD_NORM = 1.0

Measured = tuple[float | torch.Tensor, float | torch.Tensor]
"""Loss and gradient norm."""


@dataclass(frozen=True)
class Trainee:
    """A model on its devices, its optimizer, and what makes a step of token ids [B, S] on the host.

    Attributes:
        fill: gives the parameters their first values.
        end: lets go of what holds on to the process group.
        mesh: that ours is sharded over; None in one process, and of other implementations.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: Callable[[torch.Tensor], Measured]
    fill: Callable[[], None]
    mesh: ParallelMesh | None = None
    end: Callable[[], None] = lambda: None

    def start_over(self, *, checkpointing: Checkpointing) -> None:
        """First weights and an optimizer that has seen nothing, in the same memory; with that checkpointing."""
        self.end()
        # Else another batch size would have layers compiled for all of them, which costs half a percent.
        torch._dynamo.reset()
        self.fill()
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.model.train()
        if isinstance(self.model, NativeCausalLM):
            self.model.selective_checkpointing_enable(checkpointing == "selective")
        elif checkpointing == "selective":
            raise UsageError("selective checkpointing is of our models")
        if checkpointing is True:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        elif getattr(self.model, "is_gradient_checkpointing", False):
            # NeMo's classes, which have no such switch, never come here.
            self.model.gradient_checkpointing_disable()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def build(arguments: argparse.Namespace) -> Trainee:
    """The model of `arguments.child` with memory for its parameters, sharded where there are several processes."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = getattr(torch, arguments.dtype)
    fields = dict(CASES[arguments.case])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    if arguments.child == training_peers.NEMO:
        model, loss_of, fill = training_peers.nemo_model(config, CASES[arguments.case], device)
        return _peer(model, loss_of, fill, arguments.lr, device)
    mesh = None
    if arguments.gpus > 1:
        mesh = ParallelMesh.of(MeshConfig(ep=int(arguments.ep)).build(device.type))
    if arguments.child in OURS:
        with torch.device("meta"):
            model = NATIVE_MODELS[config.model_type](config, backend=Backend.parse(OURS[arguments.child]))
        model = model.to(dtype)
        parallelize(model, mesh)
    else:
        model = training_peers.transformers_model(arguments.child, config, dtype)
        small = sum(p.numel() * p.element_size() for p in model.parameters()) <= PEERS_KEEP
        parallelize(model, mesh, reshard_after_forward=False if small else None)
    allocate(model, device)

    def fill_model() -> None:
        training_weights.fill(model)

    if isinstance(model, NativeCausalLM):
        graphs = arguments.child != "ours-without-graphs"
        return _ours(model, mesh, fill_model, arguments.lr, device, graphs=graphs)
    return _peer(model, training_peers.transformers_loss(model), fill_model, arguments.lr, device)


def _ours(
    model: NativeCausalLM,
    mesh: ParallelMesh | None,
    fill: Callable[[], None],
    lr: float,
    device: torch.device,
    *,
    graphs: bool,
) -> Trainee:
    optimizer = build_optimizer(model, OptimizerConfig(lr=lr))
    make_optimizer_state(optimizer)
    captured: dict[tuple[torch.Size, bool, bool], StepGraph | None] = {}

    def forget() -> None:
        for graph in captured.values():
            if graph is not None:
                graph.close()
        captured.clear()

    def step(ids: torch.Tensor) -> Measured:
        key = (ids.shape, model.is_gradient_checkpointing, model.is_selective_checkpointing)
        if key not in captured:
            forget()
            captured[key] = step_graph(model, 1) if graphs else None
        batch = Batch(ids, torch.arange(ids.shape[1]).expand_as(ids), ids).to(device)
        result = train_step(model, optimizer, [batch], mesh, max_grad_norm=MAX_GRAD_NORM, graph=captured[key])
        return result.loss, result.grad_norm

    return Trainee(model, optimizer, step, fill, mesh, forget)


def _peer(
    model: PreTrainedModel,
    loss_of: training_peers.Loss,
    fill: Callable[[], None],
    lr: float,
    device: torch.device,
) -> Trainee:
    ours = OptimizerConfig(lr=lr)
    decays, rest = ([p for p in model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False))
    groups = [{"params": decays, "weight_decay": ours.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=ours.betas, eps=ours.eps, fused=True)

    def step(ids: torch.Tensor) -> Measured:
        loss = loss_of(to_device(ids, device))
        loss.backward()
        norm = _clipped(optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    return Trainee(model, optimizer, step, fill)


def _clipped(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """What `torch.nn.utils.clip_grad_norm_` does, with a factor in the dtype of the gradients that it multiplies.

    One in FP32, because some gradients are, has all others multiplied one by one, in 23 ms instead of 5 for 9 layers of
    Nemotron-3-Nano.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    # In one order on all processes: sharded norms are added up for each.
    for dtype in dict.fromkeys(p.dtype for p in parameters):
        alike = [p for p in parameters if p.dtype == dtype]
        torch.nn.utils.clip_grads_with_norm_(alike, MAX_GRAD_NORM, norm.to(dtype))
    return norm
