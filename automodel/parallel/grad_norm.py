"""The gradient norm: one number over dense and expert parameters, the same on every process and on any mesh."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from automodel.kernels.packages import is_installed
from automodel.parallel.local import local_part
from automodel.parallel.mesh import ParallelMesh, data_parallel


@torch.no_grad()
def global_grad_norm(model: nn.Module, mesh: DeviceMesh | ParallelMesh | None) -> torch.Tensor:
    """L2 norm of all gradients of `model` as if one process held them.

    Each element is counted once: by the process at coordinate 0 of every axis over which it is replicated. Squares
    are added up in FP32 within a tensor (with Triton, a block of one) and in FP64 beyond it.

    Returns:
        0-d FP64 tensor on the device of the gradients, equal on all processes.
    """
    root = mesh.root if isinstance(mesh, ParallelMesh) else mesh
    mine = [local_part(p.grad) for p in model.parameters() if p.grad is not None and _is_owner(p.grad, root)]
    mine = [grad for grad in mine if grad.numel()]
    device = next(model.parameters()).device
    total = _square_sum(mine) if mine else torch.zeros((), dtype=torch.float64, device=device)
    if root is not None:
        for axis in range(root.ndim):
            if root.size(axis) > 1:
                dist.all_reduce(total, group=root.get_group(axis))
    return total.sqrt()


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients of this norm are multiplied by, so that their norm is at most `max_norm`: FP32, 0-d."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).float()


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, mesh: DeviceMesh | ParallelMesh | None) -> torch.Tensor:
    """Scale all gradients so that their global norm is at most `max_norm` (`math.inf` only measures).

    Returns:
        The norm before clipping, as `global_grad_norm`.
    """
    norm = global_grad_norm(model, mesh)
    if math.isfinite(max_norm):
        scale_gradients_(model, clip_factor(norm, max_norm))
    return norm


@torch.no_grad()
def scale_gradients_(model: nn.Module, factor: torch.Tensor) -> None:
    """Multiply every gradient by `factor`, a 0-d tensor; 1 costs nothing."""
    # A number of the host: lists of BF16 tensors times an FP32 tensor take torch's slow path, 5 times slower.
    scale = float(factor)
    if scale == 1.0:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(local_part(parameter.grad))
    for same in by_dtype.values():
        torch._foreach_mul_(same, scale)


def _square_sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    if tensors[0].is_cuda and is_installed("triton"):
        from automodel.kernels.triton_norm import square_sum

        return square_sum([tensor.contiguous() for tensor in tensors])
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).double().square().sum()


def _is_owner(grad: torch.Tensor, root: DeviceMesh | None) -> bool:
    """Whether this process counts its part of `grad`: it is the first among those that hold the same part."""
    if not isinstance(grad, DTensor):
        return data_parallel(root)[0] == 0
    coordinate = grad.device_mesh.get_coordinate()
    axes = zip(grad.placements, coordinate, strict=True)
    return all(position == 0 for placement, position in axes if isinstance(placement, Replicate))
