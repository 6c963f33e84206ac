"""The gated MLP of many experts over rows sorted by expert: a reference loop, and grouped matrix multiplication.

Legend: M rows, D hidden, F expert width, E experts of this process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

ExpertsKernel = Literal["torch", "grouped_mm"]
Activation = Callable[[torch.Tensor], torch.Tensor]

_grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
_GROUPED_DTYPES = {
    "cpu": (torch.bfloat16, torch.float16, torch.float32),
    "cuda": (torch.bfloat16,),
}
_ALIGNMENT_BYTES = 16


def grouped_mm_obstacle(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> str | None:
    """Why torch's grouped matrix multiplication cannot run these experts, or None when it can.

    Args:
        device: of the parameters; for CUDA the compute capability is checked.
        dtype: of the parameters and activations.
        hidden: D, elements of a row going in.
        width: F, elements between the two projections.
    """
    if _grouped_mm is None:
        return f"torch {torch.__version__} has no grouped_mm"
    if dtype not in _GROUPED_DTYPES.get(device.type, ()):
        return f"grouped_mm does not take {str(dtype).removeprefix('torch.')} on {device.type}"
    if dtype != torch.bfloat16 and torch.compiler.is_compiling():
        return "torch.compile traces grouped_mm in bfloat16 only"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "grouped_mm needs compute capability 8.0"
    for name, size in (("hidden size", hidden), ("expert width", width)):
        if size * dtype.itemsize % _ALIGNMENT_BYTES:
            return f"grouped_mm needs rows of whole {_ALIGNMENT_BYTES} bytes; {name} {size} is not in {dtype}"
    return None


def expert_mlp(
    x_MD: torch.Tensor,
    counts_E: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    kernel: ExpertsKernel,
    activation: Activation = F.silu,
) -> torch.Tensor:
    """down(activation(gate(x)) * up(x)) with the expert of each row.

    Args:
        x_MD: rows sorted by expert.
        counts_E: rows of each expert, in expert order; sums to M; zeros are allowed.
        gate_up_E2FD: gate rows then up rows of each expert.
        down_EDF: output projection of each expert.
        kernel: `"torch"` loops over experts (any device and dtype); `"grouped_mm"` has the limits that
            `grouped_mm_obstacle` tells.
        activation: of the gate half.

    Returns:
        [M, D] in the dtype of `x_MD`.
    """
    if kernel == "grouped_mm":
        ends_E = torch.cumsum(counts_E, 0, dtype=torch.int32)
        gate_MF, up_MF = _GroupedLinear.apply(x_MD, gate_up_E2FD, ends_E).chunk(2, dim=-1)
        return _GroupedLinear.apply(activation(gate_MF) * up_MF, down_EDF, ends_E)
    return _loop(x_MD, counts_E, gate_up_E2FD, down_EDF, activation)


class _GroupedLinear(torch.autograd.Function):
    """y = x @ w[e].T for the rows of each expert e.

    torch differentiates grouped_mm itself, but refuses gradients that are expanded views, and rows that are none.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_MI: torch.Tensor, weight_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_MI, weight_EOI, ends_E)
        return _grouped(x_MI, weight_EOI.transpose(-2, -1), ends_E)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_MO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MI, weight_EOI, ends_E = ctx.saved_tensors
        grad_MO = grad_MO.contiguous()
        grad_x = _grouped(grad_MO, weight_EOI, ends_E) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            empty = x_MI.shape[0] == 0
            grad_weight = torch.zeros_like(weight_EOI) if empty else _grouped_mm(grad_MO.t(), x_MI, offs=ends_E)
        return grad_x, grad_weight, None


def _grouped(x_MI: torch.Tensor, weight_EIO: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    if x_MI.shape[0] == 0:
        return x_MI.new_zeros(0, weight_EIO.shape[-1])
    return _grouped_mm(x_MI.contiguous(), weight_EIO, offs=ends_E)


def _loop(
    x_MD: torch.Tensor,
    counts_E: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    # unbind, not indexing: its backward stacks the gradients once, where each index would make a full-size tensor.
    rows = x_MD.split(counts_E.tolist())
    parts = [
        F.linear(_gated(F.linear(x, gate_up), activation), down)
        for x, gate_up, down in zip(rows, gate_up_E2FD.unbind(0), down_EDF.unbind(0), strict=True)
    ]
    # A process that holds no expert receives no rows; its input stands in, to stay part of the backward pass.
    return torch.cat(parts) if parts else x_MD


def _gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up
