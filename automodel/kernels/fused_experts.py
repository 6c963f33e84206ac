"""The experts of a layer as one autograd function: grouped matrix products, and Triton kernels between them.

Against the composition of separate operations: rows are gathered and summed without atomics, the routing weight is
applied between the projections where rows are narrowest, and of the large intermediates only the first projection's
output is kept for the backward pass. Nothing waits for the device.

Legend: N tokens, K experts per token, M = N * K rows sorted by expert, D hidden, F expert width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.autograd.function import FunctionCtx

from automodel.kernels import triton_rows
from automodel.kernels.experts import expert_of_row
from automodel.kernels.permute import ExpertOrder
from automodel.kernels.products import Products, product_and_activation, products_obstacle
from automodel.kernels.triton_rows import ActivationForm


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is the same forward and backward: the sort (None: rows come sorted), and the activation."""

    order: ExpertOrder | None
    form: ActivationForm
    quack: bool
    """Whether QuACK's products multiply."""
    activation: str | None
    """QuACK's name of it, where the first product applies it; gate and up then come in turn, as `form` says."""


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
    quack = order is not None and products_obstacle(x.device, x.dtype, *down_EDF.shape[1:]) is None
    activation = form.quack if quack and gate_up_bias_E2F is None and down_bias_ED is None else None
    plan = _Plan(order, replace(form, in_turn=activation == "swiglu"), quack, activation)
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
        products = Products.of(ends, quack=plan.quack)
        rows = _rows(x, plan.order)
        if plan.activation is not None:
            keeps = any(ctx.needs_input_grad)
            h, activated = product_and_activation(rows, gate_up.mT, products.starts_E, plan.activation, keeps=keeps)
            del rows
            rows = products.by_row(activated, down.mT)
            out = triton_rows.sum_rows(rows, plan.order.inverse_M, plan.order.top_k, factor=weight_M)
        else:
            h = products.by_row(rows, gate_up.mT)
            del rows
            activated = triton_rows.activate(h, weight_M, plan.form, gate_up_bias, expert)
            out = _sum(products.by_row(activated, down.mT), plan.order, weight_M, down_bias, expert)
        ctx.save_for_backward(x, weight_M, h, gate_up, down, gate_up_bias, down_bias, ends, expert)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_M, h, gate_up, down, gate_up_bias, down_bias, ends, expert = ctx.saved_tensors
        order, form, products = ctx.plan.order, ctx.plan.form, Products.of(ends, quack=ctx.plan.quack)
        needs = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_rows = _rows(grad, order)
        grad_h, activated, grad_weight = triton_rows.activate_backward(
            h, weight_M, products.by_row(grad_rows, down), form, gate_up_bias, expert
        )
        grads: list[torch.Tensor | None] = [None] * len(needs)
        if needs[3]:
            grads[3] = products.over_rows(grad_rows, activated)
        if needs[5]:
            grads[5] = triton_rows.sum_by_expert(grad_rows, ends, weight_M)
        if down_bias is not None and needs[1]:
            triton_rows.add_dot_with_bias(grad_weight, grad_rows, down_bias, expert)
        del grad_rows, activated
        if needs[2]:
            grads[2] = products.over_rows(_rows(x, order), grad_h, transposed=True)
        if needs[4]:
            grads[4] = triton_rows.sum_by_expert(grad_h, ends)
        if needs[0]:
            grads[0] = _sum(products.by_row(grad_h, gate_up), order)
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
