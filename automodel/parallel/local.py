"""What one process holds of a model: its part of each tensor, where that part lies in the whole, and its bytes.

Also the proof that a load wrote all of it: elements are poisoned before, and none may be poison after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ckpt_tools.core.dtypes import BY_TORCH_NAME, DType
from ckpt_tools.core.errors import LayoutError, listed

_PIECE = 1 << 24
"""Elements of a tensor on an accelerator that are looked at together."""


@dataclass(frozen=True)
class LocalBox:
    """The part of a tensor that this process holds.

    Attributes:
        name: of the whole tensor.
        tensor: the elements, a view of the parameter's memory.
        offsets: index of its first element in the whole tensor.
    """

    name: str
    tensor: torch.Tensor
    offsets: tuple[int, ...]

    @property
    def dtype(self) -> DType:
        return BY_TORCH_NAME[str(self.tensor.dtype).removeprefix("torch.")]


def tensors_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers of `model`; a tied parameter has its first name only."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = buffer
    return found


def local_boxes(model: nn.Module) -> Iterator[LocalBox]:
    """What this process holds of each tensor of `model`; empty parts are left out."""
    return boxes_of(tensors_by_name(model))


def boxes_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[LocalBox]:
    """What this process holds of each tensor, in memory that it shares with it; empty parts are left out."""
    for name, tensor in tensors.items():
        offsets: tuple[int, ...] = (0,) * tensor.ndim
        local = tensor.detach()
        if isinstance(local, DTensor):
            _, offsets = compute_local_shape_and_global_offset(local.shape, local.device_mesh, local.placements)
            local = local.to_local()
        if local.numel():
            yield LocalBox(name, local, tuple(offsets))


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def poison(tensor: torch.Tensor) -> None:
    """Set all bits: a NaN that arithmetic does not make, in every floating-point dtype. Others are left alone."""
    if tensor.is_floating_point():
        _bits(tensor).fill_(-1)


def prove_written(boxes: Iterable[LocalBox]) -> None:
    """Check that no element is poison.

    Raises:
        LayoutError: the names of the tensors that a load did not write, or not wholly.
    """
    floating = [box for box in boxes if box.tensor.is_floating_point()]
    with ThreadPoolExecutor() as pool:
        unwritten = [box.name for box, found in zip(floating, pool.map(_has_poison, floating), strict=True) if found]
    if unwritten:
        raise LayoutError(
            "elements of these tensors were not written by the load, or the checkpoint holds NaNs with all bits "
            "set:\n" + listed(unwritten),
            hint="run `ckpt verify` on the checkpoint",
        )


def _has_poison(box: LocalBox) -> bool:
    bits = _bits(box.tensor)
    if not bits.is_cpu:
        return any(bool((piece == -1).any()) for piece in bits.reshape(-1).split(_PIECE))
    # The largest number without a sign; a comparison would need memory for its result, and eight times as long.
    values = bits.numpy().view(f"u{bits.element_size()}")
    return values.size > 0 and int(values.max()) == (1 << 8 * bits.element_size()) - 1


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.element_size()])
