"""The MLP of many experts over rows sorted by expert: a reference loop, and grouped matrix multiplication.

Legend: M rows, D hidden, F expert width, E experts of this process.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

from automodel.kernels.activations import SWIGLU, GatedActivation, Ungated, activate
from automodel.kernels.packages import is_installed
from automodel.kernels.te_experts import TeGroupedLinear

ExpertsKernel = Literal["torch", "grouped_mm", "fused", "sonic", "te"]

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
    return rows_obstacle("grouped_mm", dtype, hidden, width)


def rows_obstacle(kernel: str, dtype: torch.dtype, hidden: int, width: int) -> str | None:
    """Why `kernel` cannot read rows of these sizes, which are to be of whole 16 bytes, or None when it can."""
    for name, size in (("hidden size", hidden), ("expert width", width)):
        if size * dtype.itemsize % _ALIGNMENT_BYTES:
            return f"{kernel} needs rows of whole {_ALIGNMENT_BYTES} bytes; {name} {size} is not in {dtype}"
    return None


def fused_obstacle(
    device: torch.device, dtype: torch.dtype, hidden: int, width: int, activation: GatedActivation | Ungated
) -> str | None:
    """Why `fused_experts` cannot run these experts, or None when it can; it needs grouped_mm and more."""
    if device.type != "cuda":
        return "the fused experts need CUDA"
    if not is_installed("triton"):
        return "the fused experts need triton, which is not installed"
    from automodel.kernels.triton_rows import activation_form

    if activation_form(activation) is None:
        return f"the fused experts have no kernel for the activation {activation}"
    return grouped_mm_obstacle(device, dtype, hidden, width)


def expert_mlp(
    x_MD: torch.Tensor,
    counts_E: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    kernel: ExpertsKernel,
    activation: GatedActivation | Ungated = SWIGLU,
    *,
    gate_up_bias_E2F: torch.Tensor | None = None,
    down_bias_ED: torch.Tensor | None = None,
) -> torch.Tensor:
    """down(activation(gate(x), up(x))) with the expert of each row, or down(activation(up(x))) without a gate.

    Args:
        x_MD: rows sorted by expert.
        counts_E: rows of each expert, in expert order; sums to M; zeros are allowed.
        gate_up_E2FD: gate rows then up rows of each expert; for an `Ungated` activation up rows only, [E, F, D].
        down_EDF: output projection of each expert.
        kernel: `"torch"` loops over experts (any device and dtype); `"grouped_mm"` has the limits that
            `grouped_mm_obstacle` tells; `"te"` is TransformerEngine's, and waits for the counts. The other kernels are
            `fused_experts` and `sonic_experts`.
        activation: of the gate half and the up half, or `Ungated`.
        gate_up_bias_E2F, down_bias_ED: added to the two projections.

    Returns:
        [M, D] in the dtype of `x_MD`.
    """
    if kernel == "te":
        return _through_te(x_MD, counts_E, gate_up_E2FD, down_EDF, activation, gate_up_bias_E2F, down_bias_ED)
    if kernel == "grouped_mm":
        ends_E = torch.cumsum(counts_E, 0, dtype=torch.int32)
        projected = _GroupedLinear.apply(x_MD, gate_up_E2FD, gate_up_bias_E2F, ends_E)
        return _GroupedLinear.apply(activate(projected, activation), down_EDF, down_bias_ED, ends_E)
    return _loop(x_MD, counts_E, gate_up_E2FD, down_EDF, activation, gate_up_bias_E2F, down_bias_ED)


class _GroupedLinear(torch.autograd.Function):
    """y = x @ w[e].T + b[e] for the rows of each expert e.

    torch differentiates grouped_mm itself, but refuses gradients that are expanded views, and rows that are none.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_MI: torch.Tensor,
        weight_EOI: torch.Tensor,
        bias_EO: torch.Tensor | None,
        ends_E: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_MI, weight_EOI, ends_E)
        y_MO = grouped(x_MI, weight_EOI.transpose(-2, -1), ends_E)
        return y_MO if bias_EO is None else y_MO + bias_EO.index_select(0, expert_of_row(ends_E, len(x_MI)))

    @staticmethod
    def backward(ctx: FunctionCtx, grad_MO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MI, weight_EOI, ends_E = ctx.saved_tensors
        grad_MO = grad_MO.contiguous()
        grad_x = grouped(grad_MO, weight_EOI, ends_E) if ctx.needs_input_grad[0] else None
        grad_weight = grouped_weight_gradient(grad_MO, x_MI, ends_E) if ctx.needs_input_grad[1] else None
        grad_bias = None
        if ctx.needs_input_grad[2]:
            # A product, not index_add: it sums in FP32 and in one order, whatever the dtype and the device.
            expert_M = expert_of_row(ends_E, len(x_MI))
            chosen_EM = expert_M == torch.arange(len(ends_E), device=expert_M.device).unsqueeze(1)
            grad_bias = chosen_EM.to(grad_MO.dtype) @ grad_MO
        return grad_x, grad_weight, grad_bias, None


def expert_of_row(ends_E: torch.Tensor, rows: int) -> torch.Tensor:
    """Expert of each of `rows` rows that are sorted by expert, where `ends_E` says where each expert's end; [rows]."""
    return torch.searchsorted(ends_E, torch.arange(rows, device=ends_E.device, dtype=ends_E.dtype), right=True)


def grouped(x_MI: torch.Tensor, weight_EIO: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """x @ w[e] for the rows of each expert e: [M, O]."""
    if x_MI.shape[0] == 0:
        return x_MI.new_zeros(0, weight_EIO.shape[-1])
    return _grouped_mm(x_MI.contiguous(), weight_EIO, offs=ends_E)


def grouped_weight_gradient(grad_MO: torch.Tensor, x_MI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """grad.T @ x over the rows of each expert: [E, O, I]."""
    if x_MI.shape[0] == 0:
        return x_MI.new_zeros(len(ends_E), grad_MO.shape[1], x_MI.shape[1])
    return _grouped_mm(grad_MO.t(), x_MI, offs=ends_E)


@torch.compiler.disable
def _through_te(
    x_MD: torch.Tensor,
    counts_E: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    activation: GatedActivation | Ungated,
    gate_up_bias_E2F: torch.Tensor | None,
    down_bias_ED: torch.Tensor | None,
) -> torch.Tensor:
    counts = counts_E.tolist()
    if not counts:
        # As in the loop below.
        return x_MD
    projected = TeGroupedLinear.apply(x_MD, gate_up_E2FD, gate_up_bias_E2F, counts)
    return TeGroupedLinear.apply(activate(projected, activation), down_EDF, down_bias_ED, counts)


def _loop(
    x_MD: torch.Tensor,
    counts_E: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    activation: GatedActivation | Ungated,
    gate_up_bias_E2F: torch.Tensor | None,
    down_bias_ED: torch.Tensor | None,
) -> torch.Tensor:
    # unbind, not indexing: its backward stacks the gradients once, where each index would make a full-size tensor.
    rows = x_MD.split(counts_E.tolist())
    none = (None,) * len(rows)
    gate_up_biases = none if gate_up_bias_E2F is None else gate_up_bias_E2F.unbind(0)
    down_biases = none if down_bias_ED is None else down_bias_ED.unbind(0)
    experts = zip(rows, gate_up_E2FD.unbind(0), gate_up_biases, down_EDF.unbind(0), down_biases, strict=True)
    parts = []
    for x, gate_up, gate_up_bias, down, down_bias in experts:
        projected = F.linear(x, gate_up, gate_up_bias)
        parts.append(F.linear(activate(projected, activation), down, down_bias))
    # A process that holds no expert receives no rows; its input stands in, to stay part of the backward pass.
    return torch.cat(parts) if parts else x_MD
