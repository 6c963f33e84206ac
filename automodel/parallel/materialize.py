"""Filling a model that was built on the meta device with the parameters of a checkpoint.

The same code serves one process and a mesh: each process allocates its own part of every parameter and reads only the
bytes of that part, straight from the checkpoint's files. Every element is poisoned before the read and proven to be
written after it, so nothing stays random without notice.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from math import prod

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from automodel.logging import get_logger, log_once
from automodel.parallel.agree import raise_together
from automodel.parallel.local import LocalBox, host_bytes, local_boxes, poison, prove_written, tensors_by_name
from ckpt_tools.core.errors import LayoutError, listed
from ckpt_tools.engine.checkpoint import Checkpoint
from ckpt_tools.engine.memory import Box, load_boxes, model_layout
from ckpt_tools.layouts.layout import Layout

_logger = get_logger(__name__)

STAGING_BYTES = 256 << 20
"""Host memory for parameters on their way to an accelerator."""


def load_parameters(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    device: torch.device | None = None,
    staging_bytes: int = STAGING_BYTES,
) -> None:
    """Allocate the parameters and buffers of `model` and read their values from `checkpoint`.

    All processes of the mesh call this together, and an error on one is raised on all. A model that is not sharded
    concerns this process alone.

    Args:
        model: on the meta device, after `parallelize` if there is a mesh; its parameter names are the native ones, or
            those of the Hugging Face side.
        checkpoint: a Hugging Face repository or a native checkpoint, from `open_checkpoint`.
        device: where unsharded parameters go; sharded ones go to the device of their mesh. None: CPU.
        staging_bytes: bound on host memory where parameters live on an accelerator.

    Raises:
        LayoutError: names differ between model and checkpoint, or an element was not written.
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    with raise_together("loading the parameters") if sharded else nullcontext(), torch.no_grad():
        allocate(model, device)
        boxes = list(local_boxes(model))
        layout = model_layout(checkpoint, tensors_by_name(model).keys())
        _say_what_stays(checkpoint, layout)
        for box in boxes:
            poison(box.tensor)
        for group in _groups(boxes, staging_bytes):
            _load_group(checkpoint, layout, group)
        prove_written(boxes)


def allocate(model: nn.Module, device: torch.device | None = None) -> None:
    """Give every meta parameter and buffer memory; ties stay, buffers that are not saved get their values.

    Args:
        model: any mixture of meta and real tensors; real ones keep their values and move to the device.
        device: for tensors that are not `DTensor`s; None takes the mesh's device where there is one, else CPU.

    Raises:
        LayoutError: a buffer has no value and its module gives no way to compute it.
    """
    device = device or _device_of(model)
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    kept: list[tuple[nn.Module, str, torch.Tensor]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                homes.setdefault(id(parameter), []).append((module, name))
        kept += [(module, name, b) for name, b in module._buffers.items() if b is not None and not b.is_meta]
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
    for (first, first_name), *others in homes.values():
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]
    for module, name, buffer in kept:
        module._buffers[name] = buffer.to(device)
    _compute_buffers(model, {(module, name) for module, name, _ in kept}, device)


def _device_of(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _compute_buffers(model: nn.Module, kept: set[tuple[nn.Module, str]], device: torch.device) -> None:
    """Values of the buffers that no checkpoint holds: rotary frequencies, embedding scales."""
    unknown = []
    for prefix, module in model.named_modules():
        names = [n for n in module._buffers if n in module._non_persistent_buffers_set and (module, n) not in kept]
        if not names:
            continue
        if "config" in inspect.signature(type(module).__init__).parameters and hasattr(module, "config"):
            fresh = type(module)(config=module.config)
            for name in names:
                module._buffers[name] = fresh._buffers[name].to(device)
        else:
            unknown += [f"{prefix}.{name}" for name in names]
    if unknown:
        raise LayoutError(
            f"{type(model).__name__} has buffers that neither a checkpoint nor their module's config gives:\n"
            + listed(unknown),
            hint="build the model with these buffers off the meta device",
        )


def _groups(boxes: list[LocalBox], limit: int) -> Iterator[list[LocalBox]]:
    """Boxes cut along their first dimension to at most `limit` bytes, and collected to groups of at most that."""
    group: list[LocalBox] = []
    used = 0
    for box in boxes:
        for piece in _cut(box, limit):
            if group and used + piece.tensor.nbytes > limit:
                yield group
                group, used = [], 0
            group.append(piece)
            used += piece.tensor.nbytes
    if group:
        yield group


def _cut(box: LocalBox, limit: int) -> Iterator[LocalBox]:
    if box.tensor.nbytes <= limit or box.tensor.is_cpu or box.tensor.ndim == 0:
        yield box
        return
    row = prod(box.tensor.shape[1:]) * box.tensor.element_size()
    rows = max(1, limit // row)
    for start in range(0, box.tensor.shape[0], rows):
        yield LocalBox(box.name, box.tensor[start : start + rows], (box.offsets[0] + start, *box.offsets[1:]))


def _say_what_stays(checkpoint: Checkpoint, layout: Layout) -> None:
    """Nothing is left out in silence: layers for multi-token prediction, where the model's class has none."""
    left = checkpoint.layout.leaves.keys() - layout.leaves.keys()
    if left:
        log_once(
            _logger,
            logging.WARNING,
            f"{checkpoint.root}: {len(left):,} tensors of layers for multi-token prediction are not loaded, because "
            "the model's class has no such layers; what it saves will not have them either",
        )


def _load_group(checkpoint: Checkpoint, layout: Layout, group: list[LocalBox]) -> None:
    """Read a group; parameters in host memory are read in place, others through a buffer."""
    hosts = [box.tensor if box.tensor.is_cpu else torch.empty_like(box.tensor, device="cpu") for box in group]
    for box, host in zip(group, hosts, strict=True):
        if host is not box.tensor:
            poison(host)
    requests = [
        Box(box.name, box.offsets, tuple(box.tensor.shape), box.dtype, host_bytes(host))
        for box, host in zip(group, hosts, strict=True)
    ]
    load_boxes(checkpoint, requests, layout=layout)
    for box, host in zip(group, hosts, strict=True):
        if host is not box.tensor:
            box.tensor.copy_(host)
