"""The experts of a layer as one autograd function: torch's grouped matrix products, and Triton kernels between them.

Against the composition of separate operations: rows are gathered and summed without atomics, the routing weight is
applied between the projections where rows are narrowest, and of the large intermediates only the first projection's
output is kept for the backward pass. Nothing waits for the device.

Legend: N tokens, K experts per token, M = N * K rows sorted by expert, D hidden, F expert width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

from automodel.kernels import measured, triton_rows
from automodel.kernels.experts import expert_of_row, grouped, grouped_weight_gradient
from automodel.kernels.permute import ExpertOrder
from automodel.kernels.sonic import gathered_forward, products_obstacle, weight_gradient
from automodel.kernels.triton_rows import SWIGLU_FORM, ActivationForm


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is the same forward and backward: the sort (None: rows come sorted), and the activation."""

    order: ExpertOrder | None
    form: ActivationForm
    gathers: bool
    """Whether products that gather tokens themselves compute the gradients of the weights."""
    gathers_forward: bool
    """Whether they are the forward pass, too; then gate and up are kept in turn, as `form` says."""


def fused_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    counts_E: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    form: ActivationForm,
    *,
    order: ExpertOrder | None = None,
    gate_up_bias_E2F: torch.Tensor | None = None,
    down_bias_ED: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight * down(activation(gate(x), up(x))), summed over the K rows of each token.

    Args:
        x: with `order` the tokens [N, D]; without, rows [M, D] sorted by expert.
        weight: routing weights, [N, K] or [M].
        counts_E: int rows of each expert, in expert order; zeros are allowed.
        order: from `sort_by_expert`.

    Returns:
        With `order` [N, D], without [M, D]; in the dtype of `x`.
    """
    ends_E = torch.cumsum(counts_E, 0, dtype=torch.int32)
    gathers = order is not None and products_obstacle(x.device, x.dtype, *down_EDF.shape[1:]) is None
    plain = form == SWIGLU_FORM and gate_up_bias_E2F is None and down_bias_ED is None
    forward = gathers and plain and measured.gathering_wins(weight.numel(), len(counts_E))
    plan = _Plan(order, replace(form, in_turn=forward), gathers, forward)
    out: torch.Tensor = _FusedExperts.apply(
        x.contiguous(), weight, gate_up_E2FD, down_EDF, gate_up_bias_E2F, down_bias_ED, ends_E, plan
    )
    return out


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        ends: torch.Tensor,
        plan: _Plan,
    ) -> torch.Tensor:
        weight_M = weight.float() if plan.order is None else weight.flatten()[plan.order.order_M].float()
        biased = gate_up_bias is not None or down_bias is not None
        expert = expert_of_row(ends, len(weight_M)) if biased else None
        ctx.plan, ctx.weight_like = plan, (weight.shape, weight.dtype)
        if plan.gathers_forward:
            starts, token = F.pad(ends, (1, 0)), plan.order.token_M.int()
            keeps = any(ctx.needs_input_grad)
            h, rows = gathered_forward(x, gate_up, down, starts, token, "swiglu", keeps=keeps)
            out = triton_rows.sum_rows(rows, plan.order.inverse_M, plan.order.top_k, factor=weight_M)
        else:
            h = grouped(_rows(x, plan.order), gate_up.transpose(-2, -1), ends)
            activated = triton_rows.activate(h, weight_M, plan.form, gate_up_bias, expert)
            rows = grouped(activated, down.transpose(-2, -1), ends)
            out = _sum(rows, plan.order, weight_M, down_bias, expert)
        ctx.save_for_backward(x, weight_M, h, gate_up, down, gate_up_bias, down_bias, ends, expert)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_M, h, gate_up, down, gate_up_bias, down_bias, ends, expert = ctx.saved_tensors
        order, form = ctx.plan.order, ctx.plan.form
        needs = ctx.needs_input_grad
        grad = grad.contiguous()
        if ctx.plan.gathers:
            where = F.pad(ends, (1, 0)), order.token_M.int()
        grad_rows = _rows(grad, order)
        grad_h, activated, grad_weight = triton_rows.activate_backward(
            h, weight_M, grouped(grad_rows, down, ends), form, gate_up_bias, expert
        )
        grads: list[torch.Tensor | None] = [None] * len(needs)
        if needs[3]:
            if ctx.plan.gathers:
                grads[3] = weight_gradient(grad, activated, torch.empty_like(down), *where)
            else:
                grads[3] = grouped_weight_gradient(grad_rows, activated, ends)
        if needs[5]:
            grads[5] = triton_rows.sum_by_expert(grad_rows, ends, weight_M)
        if down_bias is not None and needs[1]:
            triton_rows.add_dot_with_bias(grad_weight, grad_rows, down_bias, expert)
        del grad_rows, activated
        if needs[2]:
            if ctx.plan.gathers:
                grads[2] = weight_gradient(x, grad_h, torch.empty_like(gate_up).mT, *where).mT
            else:
                grads[2] = grouped_weight_gradient(grad_h, _rows(x, order), ends)
        if needs[4]:
            grads[4] = triton_rows.sum_by_expert(grad_h, ends)
        if needs[0]:
            grads[0] = _sum(grouped(grad_h, gate_up, ends), order)
        if needs[1]:
            shape, dtype = ctx.weight_like
            by_pair = grad_weight if order is None else grad_weight[order.inverse_M]
            grads[1] = by_pair.view(shape).to(dtype)
        return tuple(grads)


def _rows(x: torch.Tensor, order: ExpertOrder | None) -> torch.Tensor:
    return x if order is None else triton_rows.spread_rows(x, order.inverse_M, order.top_k)


def _sum(
    rows: torch.Tensor,
    order: ExpertOrder | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    expert: torch.Tensor | None = None,
) -> torch.Tensor:
    if order is not None:
        return triton_rows.sum_rows(rows, order.inverse_M, order.top_k, weight=weight, bias=bias, expert=expert)
    return rows if bias is None else rows + (weight.unsqueeze(1) * bias.index_select(0, expert)).to(rows.dtype)
