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

from automodel.kernels import measured, triton_rows
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

    def products(self, ends_E: torch.Tensor) -> Products:
        token_M = None if self.order is None else self.order.token_M
        if token_M is not None and not measured.gathering_wins(len(token_M), len(ends_E)):
            token_M = None
        return Products.of(ends_E, quack=self.quack, token_M=token_M)


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
        products = plan.products(ends)
        if plan.activation is not None:
            keeps = any(ctx.needs_input_grad)
            h, activated = product_and_activation(
                _tokens(x, plan.order, products), gate_up.mT, products.starts_E, plan.activation, products.token_M,
                keeps=keeps,
            )  # fmt: skip
            rows = products.by_row(activated, down.mT)
            out = triton_rows.sum_rows(rows, plan.order.inverse_M, plan.order.top_k, factor=weight_M)
        else:
            h = products.by_token(_tokens(x, plan.order, products), gate_up.mT)
            activated = triton_rows.activate(h, weight_M, plan.form, gate_up_bias, expert)
            rows = products.by_row(activated, down.mT)
            out = _sum(rows, plan.order, weight_M, down_bias, expert)
        ctx.save_for_backward(x, weight_M, h, gate_up, down, gate_up_bias, down_bias, ends, expert)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight_M, h, gate_up, down, gate_up_bias, down_bias, ends, expert = ctx.saved_tensors
        order, form, products = ctx.plan.order, ctx.plan.form, ctx.plan.products(ends)
        needs = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_in = _tokens(grad, order, products)
        grad_h, activated, grad_weight = triton_rows.activate_backward(
            h, weight_M, products.by_token(grad_in, down), form, gate_up_bias, expert
        )
        grads: list[torch.Tensor | None] = [None] * len(needs)
        if needs[3]:
            grads[3] = products.over_rows(grad_in, activated)
        if down_bias is not None:
            grad_rows = _rows(grad, order) if products.gather else grad_in
            if needs[5]:
                grads[5] = triton_rows.sum_by_expert(grad_rows, ends, weight_M)
            if needs[1]:
                triton_rows.add_dot_with_bias(grad_weight, grad_rows, down_bias, expert)
            del grad_rows
        del grad_in, activated
        if needs[2]:
            grads[2] = products.over_rows(_tokens(x, order, products), grad_h, transposed=True)
        if needs[4]:
            grads[4] = triton_rows.sum_by_expert(grad_h, ends)
        if needs[0]:
            grads[0] = _sum(products.by_row(grad_h, gate_up), order)
        if needs[1]:
            shape, dtype = ctx.weight_like
            by_pair = grad_weight if order is None else grad_weight[order.inverse_M]
            grads[1] = by_pair.view(shape).to(dtype)
        return tuple(grads)


def _tokens(x: torch.Tensor, order: ExpertOrder | None, products: Products) -> torch.Tensor:
    """What the products take as tokens: as they come where they gather them, else as rows."""
    return x if products.gather else _rows(x, order)


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
