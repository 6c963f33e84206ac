"""Forward and backward of a micro-batch as a CUDA graph.

At small batches a step takes as long as the host needs to launch its kernels, one by one; a graph launches all of them
at once, FSDP's gathers and reductions included. Where a graph cannot be made the micro-batch runs as usual, and the log
says why. A graph contains what processes do together, so all of them replay one, or none does: they agree at the
beginning of each step.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from automodel.logging import get_logger, log_once
from automodel.models.causal_lm import NativeCausalLM
from automodel.moe.experts import Experts
from automodel.parallel.agree import gather_objects, least
from automodel.parallel.fsdp import computation_dtype, side_streams
from automodel.parallel.local import local_part
from automodel.training.data import Batch
from ckpt_tools.core.errors import CkptError

_logger = get_logger(__name__)

_EAGER_RUNS = 3
"""Micro-batches of one shape before a graph is made: compilers and libraries choose their kernels in them."""


class Backward(Protocol):
    """Forward and backward of one micro-batch."""

    def __call__(self, batch: Batch, divisor: torch.Tensor, *, last: bool) -> torch.Tensor:
        """The loss divided by `divisor`, detached; gradients are added to the parameters'. `last`: of its step."""
        ...


class Place(NamedTuple):
    """Where in its step a micro-batch is: what becomes of gradients depends on it."""

    first: bool
    last: bool


class _Readiness(IntEnum):
    """How far a process is with a step; all of them do what the least ready one can."""

    EAGER = 0
    CAPTURE = 1
    REPLAY = 2


def graph_obstacle(model: nn.Module) -> str | None:
    """Why micro-batches of `model` cannot run as a CUDA graph, or None when they can."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return "graphs need CUDA"
    if not isinstance(model, NativeCausalLM):
        return f"{type(model).__name__} may wait for the device, as no native model does"
    if getattr(model, "is_gradient_checkpointing", False):
        return "activation checkpointing keeps the state of random numbers, which a graph cannot"
    for module in model.modules():
        if isinstance(module, Experts):
            kernel = module.kernel_on(device, computation_dtype(model))
            if kernel in ("torch", "te"):
                return f"experts by {kernel} wait for the device"
            if module.dispatcher is not None and module.resolve_dispatch(kernel).kernel != "symmetric":
                return "the all-to-all of the experts waits for the device"
            return None
    return None


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph with the tensors that it reads and writes, gradients among them."""

    batch: Batch
    divisor: torch.Tensor
    loss: torch.Tensor
    gradients: list[torch.Tensor | None]
    replay: Callable[[], None]

    def run(self, batch: Batch, divisor: torch.Tensor) -> torch.Tensor:
        self.batch.input_ids.copy_(batch.input_ids)
        self.batch.labels.copy_(batch.labels)
        self.divisor.copy_(divisor)
        self.replay()
        return self.loss


class StepGraph:
    """`backward` for micro-batches, replayed from graphs for the shape that is seen first and often.

    Replays leave the gradients in tensors of their own, which become the parameters' gradients; clearing those with
    `zero_grad(set_to_none=True)` is right, keeping them from step to step is not. The parameters must stay where they
    are: a model that moves is captured anew. Before the process group ends, `close` must be called.

    Args:
        model: whose parameters receive gradients.
        backward: what is captured.
    """

    def __init__(self, model: nn.Module, backward: Backward) -> None:
        self._model = model
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._experts = [module for module in model.modules() if isinstance(module, Experts)]
        self._backward = backward
        self._obstacle = graph_obstacle(model)
        self._obstacle_is_shared = False
        self._seen: Counter[torch.Size] = Counter()
        self._runs = False
        self.close()

    def close(self) -> None:
        """Forget the graphs, and with them their memory and their hold on the process group."""
        self._shape: torch.Size | None = None
        self._graphs: dict[Place, _Captured] = {}
        self._recorder: _Recorder | None = None
        self._addresses: list[int] = []

    @property
    def captured(self) -> int:
        """How many graphs there are: one for each place in a step."""
        return len(self._graphs)

    def begin(self, batches: Sequence[Batch]) -> None:
        """Decide, with all other processes, whether the micro-batches of the step that begins run as graphs."""
        if not self._obstacle_is_shared:
            self._obstacle = next((found for found in gather_objects(self._obstacle) if found is not None), None)
            self._obstacle_is_shared = True
        self._runs = False
        if self._obstacle is not None:
            log_once(_logger, logging.INFO, f"micro-batches run without CUDA graphs: {self._obstacle}")
            return
        agreed = least(self._readiness(batches))
        self._seen.update(batch.input_ids.shape for batch in batches)
        if agreed == _Readiness.CAPTURE:
            self.close()
            self._shape, self._addresses = batches[0].input_ids.shape, self._addresses_now()
        self._runs = agreed != _Readiness.EAGER

    def backward(self, batch: Batch, divisor: torch.Tensor, place: Place) -> torch.Tensor:
        """The loss of a micro-batch of the step, with gradients added to those of the micro-batches before it."""
        captured = (self._graphs.get(place) or self._capture(batch, place)) if self._runs else None
        if captured is None:
            return self._backward(batch, divisor, last=place.last)
        loss = captured.run(batch, divisor)
        for parameter, gradient in zip(self._parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _readiness(self, batches: Sequence[Batch]) -> _Readiness:
        """What this process could do with a step of these micro-batches."""
        if any(batch.is_packed for batch in batches):
            log_once(_logger, logging.INFO, "packed micro-batches run without CUDA graphs: their documents differ")
            return _Readiness.EAGER
        shape = batches[0].input_ids.shape
        if any(batch.input_ids.shape != shape for batch in batches) or self._shape not in (None, shape):
            return _Readiness.EAGER
        if self._seen[shape] < _EAGER_RUNS or any(p.grad is not None for p in self._parameters):
            return _Readiness.EAGER
        places = {Place(number == 0, number == len(batches) - 1) for number in range(len(batches))}
        ready = places <= self._graphs.keys() and self._addresses == self._addresses_now()
        return _Readiness.REPLAY if ready else _Readiness.CAPTURE

    @torch.no_grad()
    def _addresses_now(self) -> list[int]:
        """Of what lies outside the graphs' own memory: the parameters, and what processes read from each other.

        Asked in every step while the device may wait for the host: without gradients parts of parameters cost a fifth.
        """
        buffers: list[int] = []
        for peers in {experts.peers for experts in self._experts if not isinstance(experts.peers, str)}:
            buffers += peers.addresses()
        return [local_part(parameter).data_ptr() for parameter in self._parameters] + buffers

    def _capture(self, batch: Batch, place: Place) -> _Captured | None:
        static = Batch(*(t.clone() for t in (batch.input_ids, batch.position_ids, batch.labels)))
        static.__dict__.update(target_tokens=batch.target_tokens, is_packed=batch.is_packed)
        divisor = torch.ones((), device=batch.input_ids.device)
        held = [parameter.grad for parameter in self._parameters]
        if self._recorder is None:
            self._recorder = recorder(self._model)
            # Outside of a graph first; what it leaves is what the last micro-batch of a step leaves: gradients.
            self._recorder.rehearse(lambda: self._backward(static, divisor, last=True))
            self._clear()
            if lacking := [found for found in gather_objects(self._recorder.shortage()) if found is not None]:
                self._give_up(lacking[0])
                return None
        failure, captured, interrupted = None, None, False

        def run() -> torch.Tensor:
            nonlocal interrupted
            interrupted = True
            loss = self._backward(static, divisor, last=place.last)
            interrupted = False
            return loss

        try:
            loss, replay = self._recorder.record(run)
            captured = _Captured(static, divisor, loss, [p.grad for p in self._parameters], replay)
        except RuntimeError as error:
            # What invalidated the capture was raised first, and ending the capture raised again.
            failure = str(error.__context__ or error).splitlines()[0]
        failures = [found for found in gather_objects((failure, interrupted)) if found[0] is not None]
        if not failures:
            self._graphs[place] = captured
            return captured
        reason, broken = failures[0][0], any(interrupted for _, interrupted in failures)
        self._give_up(f"capturing failed: {reason}")
        if broken and isinstance(self._model, FSDPModule):
            # FSDP stands in the middle of a pass, and has no way back.
            raise CkptError(f"forward and backward cannot be captured: {reason}", hint="set cuda_graphs: off")
        for parameter, gradient in zip(self._parameters, held, strict=True):
            parameter.grad = gradient
        return None

    def _give_up(self, obstacle: str) -> None:
        self.close()
        self._runs, self._obstacle = False, obstacle
        _logger.warning("micro-batches run without CUDA graphs: %s", self._obstacle)

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


class _Recorder:
    """Makes graphs that run one after another on a stream, in memory that they share."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stream = torch.cuda.Stream()
        self._memory = torch.cuda.graph_pool_handle()

    def rehearse(self, run: Callable[[], torch.Tensor]) -> None:
        """Run what will be recorded: libraries have workspaces for each stream, and make them at first use."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)

    def shortage(self) -> str | None:
        """Why there is no memory for a graph, or None; it cannot take what the allocator keeps for other runs."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        needed = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        if free >= needed:
            return None
        return f"a graph needs {needed / 2**30:.1f} GiB of its own, and {free / 2**30:.1f} GiB are free"

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """The result of `run`, a tensor that every replay fills anew, and the function that replays.

        Args:
            run: launches kernels, and waits for none.
        """
        graph = torch.cuda.CUDAGraph()
        # NCCL's threads ask for the state of events meanwhile, which does no harm to this one's capture.
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            result = run()
            self._join()
        return result, graph.replay

    def _join(self) -> None:
        """End the branches of the capture on the streams of FSDP, where nothing waits for their last event."""
        for stream in side_streams(self._model):
            with torch.cuda.stream(stream):
                branched = torch.cuda.is_current_stream_capturing()
            if branched:
                self._stream.wait_stream(stream)


recorder = _Recorder
"""What records; tests on machines without CUDA put their own in its place."""
