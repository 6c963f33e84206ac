"""One optimizer step over a global batch: accumulation, a loss per target token, one global norm.

The loss is the sum over all target tokens of the global batch divided by their number, whatever the split into
processes and micro-batches. Gradients are a mean over processes, so each process scales its part by their number.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.loss.loss_utils import ForCausalLMLoss

from automodel.models.causal_lm import NativeCausalLM
from automodel.parallel.grad_norm import clip_factor, global_grad_norm, scale_gradients_
from automodel.parallel.mesh import ParallelMesh
from automodel.training.data import Batch, to_device
from automodel.training.fused_adamw import FusedAdamW
from automodel.training.step_graph import Place, StepGraph
from ckpt_tools.core.errors import CkptError


@dataclass(frozen=True)
class StepResult:
    """What a step measured, the same on every process.

    Attributes:
        loss: mean over the target tokens of the global batch, before the update.
        grad_norm: before clipping.
        tokens: target tokens of the global batch.
        stop: a process asked to stop after this step.
    """

    loss: float
    grad_norm: float
    tokens: int
    stop: bool = False

    @classmethod
    def of(cls, measured: Sequence[float]) -> StepResult:
        """Of the four numbers, in this order."""
        loss, norm, tokens, stops = measured
        return cls(loss, norm, int(tokens), stops > 0)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    mesh: ParallelMesh | None,
    *,
    max_grad_norm: float | None,
    sync_last: bool = False,
    graph: StepGraph | None = None,
    stop: bool = False,
) -> StepResult:
    """Forward and backward over this process's micro-batches, clip, update.

    Args:
        model: in training mode, sharded over `mesh`.
        optimizer: its gradients are cleared afterwards.
        batches: this process's micro-batches of the global batch, on its device.
        mesh: None on a single process.
        max_grad_norm: None does not clip.
        sync_last: reduce gradients only in the last micro-batch; see `TrainingConfig.sync_gradients`.
        graph: of `step_graph`, made with the same `sync_last` and kept from step to step; None launches kernels one
            by one.
        stop: this process asks all to stop after this step.

    Raises:
        CkptError: the gradient norm is not finite; nothing was updated.
    """
    device = batches[0].input_ids.device
    processes = mesh.world_size if mesh is not None else 1
    counts = torch.tensor([sum(batch.target_tokens for batch in batches), int(stop)])
    tokens, stops = _sum_over(mesh, to_device(counts, device))
    share = (tokens / processes).float()
    total = torch.zeros((), device=device, dtype=torch.float64)
    if graph is not None:
        graph.begin(batches)
    for number, batch in enumerate(batches):
        place = Place(first=number == 0, last=number == len(batches) - 1)
        if graph is None:
            total += _backward(model, len(batches), batch, share, last=place.last, sync_last=sync_last)
        else:
            total += graph.backward(batch, share, place)
    norm = global_grad_norm(model, mesh)
    measured = torch.stack([_sum_over(mesh, total) / processes, norm, tokens.double(), stops.double()])
    if isinstance(optimizer, FusedAdamW):
        return _update_early(optimizer, norm, measured, max_grad_norm)
    result = StepResult.of(measured.tolist())
    _check(result)
    if max_grad_norm is not None and result.grad_norm > max_grad_norm:
        scale_gradients_(model, clip_factor(norm, max_grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result


def _update_early(
    optimizer: FusedAdamW, norm: torch.Tensor, measured: torch.Tensor, max_grad_norm: float | None
) -> StepResult:
    """Launch the update before the host knows the norm: where that is not finite, or no token counts, it is none.

    The wait for what was measured, the only one in a step, is then over while the device is still updating, and the
    host launches the next step meanwhile.
    """
    there = measured
    if measured.is_cuda:
        there = torch.empty(measured.shape, dtype=measured.dtype, pin_memory=True).copy_(measured, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    factor = clip_factor(norm, math.inf if max_grad_norm is None else max_grad_norm)
    optimizer.gradient_factor = factor.where(norm.isfinite() & (measured[2] > 0), math.nan)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if measured.is_cuda:
        arrived.synchronize()
    result = StepResult.of(there.tolist())
    try:
        _check(result)
    except CkptError:
        optimizer.take_back()
        raise
    return result


def step_graph(model: nn.Module, micro_batches: int, *, sync_last: bool = False) -> StepGraph:
    """Forward and backward of `model`'s micro-batches as CUDA graphs, in steps of that many."""
    return StepGraph(model, partial(_backward, model, micro_batches, sync_last=sync_last, settle=True))


def _backward(
    model: nn.Module,
    micro_batches: int,
    batch: Batch,
    divisor: torch.Tensor,
    *,
    last: bool,
    sync_last: bool,
    settle: bool = False,
) -> torch.Tensor:
    """`Backward`. `settle` leaves nothing in flight for the next micro-batch to wait for, as FSDP does otherwise."""
    _prepare_backward(model, last=last, sync_last=sync_last, settle=settle)
    loss = batch_loss(model, batch, divisor, micro_batches)
    loss.backward()
    return loss.detach()


def _check(result: StepResult) -> None:
    if not result.tokens:
        raise CkptError("no token of the global batch counts in the loss", hint="check data.loss_on and the data")
    if not math.isfinite(result.grad_norm):
        raise CkptError(
            f"the gradient norm is {result.grad_norm} and the loss {result.loss}; the model was not updated",
            hint="lower optimizer.lr or warm up longer, and resume from the last checkpoint",
        )


def batch_loss(model: nn.Module, batch: Batch, tokens: torch.Tensor, micro_batches: int) -> torch.Tensor:
    """Sum of the micro-batch's token losses divided by `tokens`, plus its share of the router's auxiliary loss."""
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.is_packed:
        inputs["position_ids"] = batch.position_ids
    if not _takes_loss_arguments(model):
        logits = model(**inputs).logits
        return ForCausalLMLoss(logits, batch.labels, logits.shape[-1], num_items_in_batch=tokens)
    if isinstance(model, NativeCausalLM):
        inputs["skip_logits"] = True
    output = model(**inputs, labels=batch.labels, num_items_in_batch=tokens)
    loss: torch.Tensor = output.loss
    auxiliary = getattr(output, "aux_loss", None)
    if auxiliary is not None and micro_batches > 1:
        # It is a mean over a micro-batch and not a sum over tokens: each micro-batch has its share of the step.
        loss = loss - model.config.router_aux_loss_coef * auxiliary.to(loss.device) * (1 - 1 / micro_batches)
    return loss


def _takes_loss_arguments(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _prepare_backward(model: nn.Module, *, last: bool, sync_last: bool, settle: bool) -> None:
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(last or settle)
    if sync_last:
        model.set_requires_gradient_sync(last)
    else:
        # Replicas (HSDP) exchange the sum of all micro-batches once.
        model.set_requires_all_reduce(last)


def _sum_over(mesh: ParallelMesh | None, value: torch.Tensor) -> torch.Tensor:
    if mesh is not None:
        for axis in range(mesh.root.ndim):
            if mesh.root.size(axis) > 1:
                dist.all_reduce(value, group=mesh.root.get_group(axis))
    return value
