"""The products of many experts through TransformerEngine's grouped GEMM: one cuBLAS product an expert, on four streams.

Legend: M rows sorted by expert, I values in, O values out, E experts.
"""

from __future__ import annotations

import torch
from torch.autograd.function import FunctionCtx


class TeGroupedLinear(torch.autograd.Function):
    """y = x @ w[e].T + b[e] for the rows of each expert e.

    Args:
        x_MI, weight_EOI, bias_EO: of one half-precision dtype; the bias may be None.
        counts: rows of each expert, known to the host; zeros are allowed.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_MI: torch.Tensor,
        weight_EOI: torch.Tensor,
        bias_EO: torch.Tensor | None,
        counts: list[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(x_MI, weight_EOI)
        ctx.counts = counts
        rows = x_MI.contiguous().split(counts)
        y_MO = x_MI.new_empty(len(x_MI), weight_EOI.shape[1])
        bias = None if bias_EO is None else list(bias_EO.unbind(0))
        _multiply(weight_EOI.unbind(0), rows, [y_MO], counts, "TN", single_output=True, bias=bias, use_bias=bool(bias))
        return y_MO

    @staticmethod
    def backward(ctx: FunctionCtx, grad_MO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_MI, weight_EOI = ctx.saved_tensors
        grads = grad_MO.contiguous().split(ctx.counts)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x_MI, memory_format=torch.contiguous_format)
            _multiply(weight_EOI.unbind(0), grads, [grad_x], ctx.counts, "NN", single_output=True, grad=True)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight_EOI)
            rows, parts = x_MI.contiguous().split(ctx.counts), list(grad_weight.unbind(0))
            _multiply(rows, grads, parts, ctx.counts, "NT", grad=True)
        if ctx.needs_input_grad[2]:
            grad_bias = torch.stack([grad.sum(0) for grad in grads])
        return grad_x, grad_weight, grad_bias, None


def _multiply(
    left: tuple[torch.Tensor, ...],
    right: tuple[torch.Tensor, ...],
    out: list[torch.Tensor],
    counts: list[int],
    layout: str,
    **how: object,
) -> None:
    """Fill `out` with the products of `left` and `right`, in cuBLAS's order of them."""
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    if sum(counts):
        unquantised = [None] * len(counts)
        general_grouped_gemm(
            list(left), list(right), out, unquantised, out[0].dtype, layout=layout, m_splits=counts, **how
        )
        return
    for tensor in out:
        tensor.zero_()
