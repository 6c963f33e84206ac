"""Forward and backward of a micro-batch as a CUDA graph.

At small batches a step takes as long as the host needs to launch its kernels, one by one; a graph launches all of them
at once. Where a graph cannot be made the micro-batch runs as usual, and the log says why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from automodel.logging import get_logger, log_once
from automodel.models.causal_lm import NativeCausalLM
from automodel.moe.experts import Experts
from automodel.training.data import Batch

_logger = get_logger(__name__)

Backward = Callable[[Batch, torch.Tensor], torch.Tensor]
"""(micro-batch, divisor of its loss) -> its loss, detached; gradients are added to the parameters'."""

_EAGER_RUNS = 3
"""Micro-batches of one shape before a graph is made: compilers and libraries choose their kernels in them."""


def graph_obstacle(model: nn.Module) -> str | None:
    """Why micro-batches of `model` cannot run as a CUDA graph, or None when they can."""
    if next(model.parameters()).device.type != "cuda":
        return "graphs need CUDA"
    if not isinstance(model, NativeCausalLM):
        return f"{type(model).__name__} may wait for the device, as no native model does"
    if isinstance(model, FSDPModule):
        return "the model is sharded by FSDP, whose hooks run on the host"
    if getattr(model, "is_gradient_checkpointing", False):
        return "activation checkpointing keeps the state of random numbers, which a graph cannot"
    for module in model.modules():
        if isinstance(module, Experts):
            kernel = module.kernel_for(module.down_proj)
            return f"experts by {kernel} wait for the device" if kernel in ("torch", "te") else None
    return None


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph with the tensors that it reads and writes."""

    batch: Batch
    divisor: torch.Tensor
    loss: torch.Tensor
    replay: Callable[[], None]

    def run(self, batch: Batch, divisor: torch.Tensor) -> torch.Tensor:
        self.batch.input_ids.copy_(batch.input_ids)
        self.batch.labels.copy_(batch.labels)
        self.divisor.copy_(divisor)
        self.replay()
        return self.loss


class StepGraph:
    """`backward` for micro-batches, replayed from a graph for the shape that is seen first and often.

    Replays leave the gradients in tensors of their own, which become the parameters' gradients; clearing those with
    `zero_grad(set_to_none=True)` is right, keeping them from step to step is not. The parameters must stay where they
    are: a model that moves is captured anew.

    Args:
        model: whose parameters receive gradients.
        backward: what is captured.
    """

    def __init__(self, model: nn.Module, backward: Backward) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._backward = backward
        self._seen: Counter[torch.Size] = Counter()
        self._obstacle = graph_obstacle(model)
        self._forget()

    def backward(self, batch: Batch, divisor: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch, with gradients added to those of the micro-batches before it in this step."""
        replay = self._graph_for(batch)
        if replay is None:
            return self._backward(batch, divisor)
        loss = replay.run(batch, divisor)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _graph_for(self, batch: Batch) -> _Captured | None:
        """The graph that can run this micro-batch now, made where it is time to."""
        shape = batch.input_ids.shape
        if self._obstacle is not None:
            log_once(_logger, logging.INFO, f"micro-batches run without CUDA graphs: {self._obstacle}")
            return None
        if batch.is_packed:
            log_once(_logger, logging.INFO, "packed micro-batches run without CUDA graphs: their documents differ")
            return None
        if self._addresses != self._addresses_now():
            self._forget()
        self._seen[shape] += 1
        if self._seen[shape] <= _EAGER_RUNS or self._shape not in (None, shape):
            return None
        if all(parameter.grad is None for parameter in self._parameters):
            return self._first or self._capture(batch)
        if self._first is None or not self._holds_own_gradients():
            # The step began without a graph, and goes on so.
            return None
        return self._next or self._capture(batch)

    def _holds_own_gradients(self) -> bool:
        return all(p.grad is g for p, g in zip(self._parameters, self._gradients, strict=True))

    def _addresses_now(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    def _forget(self) -> None:
        self._shape: torch.Size | None = None
        self._first: _Captured | None = None
        """Writes gradients."""
        self._next: _Captured | None = None
        """Adds to the gradients that `_first` wrote."""
        self._gradients: list[torch.Tensor | None] = []
        self._addresses = self._addresses_now()

    def _capture(self, batch: Batch) -> _Captured | None:
        static = Batch(*(t.clone() for t in (batch.input_ids, batch.position_ids, batch.labels)))
        static.__dict__.update(target_tokens=batch.target_tokens, is_packed=batch.is_packed)
        divisor = torch.ones((), device=batch.input_ids.device)
        held = [parameter.grad for parameter in self._parameters]
        try:
            loss, replay = capture(
                lambda: self._backward(static, divisor), self._clear if self._first is None else None
            )
        except RuntimeError as error:
            # What invalidated the capture was raised first, and ending the capture raised again.
            first = error.__context__ or error
            self._obstacle = f"capturing failed: {str(first).splitlines()[0]}"
            for parameter, gradient in zip(self._parameters, held, strict=True):
                parameter.grad = gradient
            _logger.warning("micro-batches run without CUDA graphs: %s", self._obstacle)
            return None
        captured = _Captured(static, divisor, loss, replay)
        if self._first is None:
            self._first, self._shape = captured, batch.input_ids.shape
            self._gradients = [parameter.grad for parameter in self._parameters]
        else:
            self._next = captured
        return captured

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def capture(
    run: Callable[[], torch.Tensor], trial: Callable[[], None] | None
) -> tuple[torch.Tensor, Callable[[], None]]:
    """The result of `run`, a tensor that every replay fills anew, and the function that replays.

    Args:
        run: launches kernels, and waits for none.
        trial: called after a first run outside of the graph, to clear its traces; None leaves that run out.
    """
    stream = torch.cuda.Stream()
    if trial is not None:
        # Libraries have workspaces for each stream, and make them at first use.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        trial()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = run()
    return result, graph.replay
