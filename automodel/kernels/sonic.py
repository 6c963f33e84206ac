"""The experts of a layer as SonicMoE computes them (arXiv 2512.14080): grouped products that gather their rows, and
that apply the activation, its derivative and the routing weights to what they hold in registers.

The products are QuACK's, with which sonic-moe is built, called as sonic-moe calls them. Its own function is not used
because it tunes them anew for every number of rows, and that changes in every step where experts are divided over
processes. Both take gate rows then up rows, and write their gradients so: weights are read where they are.

Legend: N tokens, K experts per token, M = N * K rows sorted by expert, D hidden, F expert width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

from automodel.kernels.activations import GatedActivation, Ungated
from automodel.kernels.permute import ExpertOrder
from automodel.kernels.products import products_obstacle


def sonic_obstacle(
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    width: int,
    activation: GatedActivation | Ungated,
    *,
    bias: bool = False,
) -> str | None:
    """Why `sonic_experts` cannot run these experts, or None when it can."""
    if found := products_obstacle(device, dtype, hidden, width):
        return found
    from automodel.kernels.triton_rows import activation_form

    form = activation_form(activation)
    if form is None or form.quack is None:
        return f"the SonicMoE kernels have no activation {activation}"
    return "the SonicMoE kernels are called without biases" if bias else None


def _weight_gradient(
    tokens: torch.Tensor,
    rows_MF: torch.Tensor,
    out_EDF: torch.Tensor,
    starts_E: torch.Tensor,
    token_M: torch.Tensor | None,
    *,
    halves: bool = False,
) -> torch.Tensor:
    """tokens[token of the row].T @ rows, over the rows of each expert, into `out_EDF`; the tokens are read in place.

    Args:
        tokens, rows_MF: contiguous; without `token_M` both are rows.
        out_EDF: contiguous, or the transpose of what is.
        starts_E: int32 [E + 1], where the rows of each expert begin, then M.
        token_M: int32.
        halves: the rows have gate and up in turn, `out_EDF` has one after the other.
    """
    from quack.gemm_interface import gemm

    return gemm(
        tokens.mT, rows_MF, out=out_EDF, cu_seqlens_k=starts_E, A_idx=token_M, dynamic_scheduler=False, tuned=False,
        concat_layout=("out",) if halves else None,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is the same forward and backward: the sort (None: rows come sorted), and QuACK's name of the activation."""

    order: ExpertOrder | None
    activation: str

    @property
    def halves(self) -> bool:
        """Whether the first projection has gate rows and up rows, which QuACK pairs with each other."""
        return self.activation == "swiglu"


def sonic_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    counts_E: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    activation: GatedActivation | Ungated,
    *,
    order: ExpertOrder | None = None,
) -> torch.Tensor:
    """weight * down(activation(gate(x), up(x))), summed over the K rows of each token, where `sonic_obstacle` has none.

    Args:
        x: with `order` the tokens [N, D]; without, rows [M, D] sorted by expert.
        weight: routing weights, [N, K] or [M].
        counts_E: int rows of each expert, in expert order; zeros are allowed.
        gate_up_E2FD: [E, 2F, D], or [E, F, D] for an `Ungated` activation.
        order: from `sort_by_expert`.

    Returns:
        With `order` [N, D], without [M, D]; in the dtype of `x`.
    """
    from automodel.kernels.triton_rows import activation_form

    starts = F.pad(torch.cumsum(counts_E, 0, dtype=torch.int32), (1, 0))
    plan = _Plan(order, activation_form(activation).quack)
    out: torch.Tensor = _SonicExperts.apply(x.contiguous(), weight, gate_up_E2FD, down_EDF, starts, plan)
    return out


class _SonicExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        starts: torch.Tensor,
        plan: _Plan,
    ) -> torch.Tensor:
        from quack.gemm_interface import gemm, gemm_act

        order = plan.order
        weight_M = weight.float() if order is None else weight.flatten()[order.order_M].float()
        token_M = None if order is None else order.token_M.int()
        ctx.plan, ctx.rows, ctx.weight_like = plan, len(weight_M), (weight.shape, weight.dtype)
        if order is None:
            x, weight_M = _with_room(x), _with_room(weight_M)
        h, activated = gemm_act(
            x, gate_up.mT, activation=plan.activation, cu_seqlens_m=starts, A_idx=token_M,
            store_preact=any(ctx.needs_input_grad), tuned=False, concat_layout=("B",) if plan.halves else None,
        )  # fmt: skip
        rows = gemm(activated, down.mT, cu_seqlens_m=starts, tuned=False)
        ctx.save_for_backward(x, weight_M, h, gate_up, down, starts, token_M)
        return _sum(rows[: ctx.rows], order, weight_M)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from quack.gemm_interface import gemm, gemm_dact

        x, weight_M, h, gate_up, down, starts, token_M = ctx.saved_tensors
        order, needs = ctx.plan.order, ctx.needs_input_grad
        by_row = {"cu_seqlens_m": starts, "dynamic_scheduler": False, "tuned": False}
        halves = ctx.plan.halves

        grad = grad.contiguous() if order is not None else _with_room(grad.contiguous())
        grad_h, activated, grad_weight = gemm_dact(
            grad, down, PreAct=h, activation=ctx.plan.activation, colvec_scale=weight_M, colvec_reduce=True,
            A_idx=token_M, **by_row,
        )  # fmt: skip
        grads: list[torch.Tensor | None] = [None] * len(needs)
        if needs[3]:
            grads[3] = _weight_gradient(grad, activated, down.new_empty(down.shape), starts, token_M)
        del activated
        if needs[2]:
            grads[2] = gate_up.new_empty(gate_up.shape)
            _weight_gradient(x, grad_h, grads[2].mT, starts, token_M, halves=halves)
        if needs[0]:
            rows = gemm(grad_h, gate_up, concat_layout=("B",) if halves else None, **by_row)[: ctx.rows]
            grads[0] = rows if order is None else _sum(rows, order)
        if needs[1]:
            shape, dtype = ctx.weight_like
            by_pair = grad_weight[: ctx.rows] if order is None else grad_weight[order.inverse_M]
            grads[1] = by_pair.view(shape).to(dtype)
        return tuple(grads)


def _sum(rows: torch.Tensor, order: ExpertOrder | None, factor: torch.Tensor | None = None) -> torch.Tensor:
    """The rows of each token added up, times `factor` [M]; without an order each row is a token's only one."""
    from automodel.kernels.triton_rows import sum_rows

    if order is not None:
        return sum_rows(rows, order.inverse_M, order.top_k, factor=factor)
    return sum_rows(rows, torch.arange(len(rows), dtype=torch.int32, device=rows.device), 1, factor=factor)


def _with_room(rows: torch.Tensor) -> torch.Tensor:
    """`rows` and up to a sixteenth more, undefined and in no expert's range.

    QuACK plans each product in Python, and keeps the plan, for every shape that it meets; so it meets few.
    """
    step = 1 << max(len(rows).bit_length() - 5, 0)
    if len(rows) % step == 0:
        return rows
    with_room = rows.new_empty(-(-len(rows) // step) * step, *rows.shape[1:])
    with_room[: len(rows)] = rows
    return with_room
