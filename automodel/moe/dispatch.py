"""Moving tokens to the processes that hold their experts, and the results back, with gradients.

A dispatcher is what `Experts` talks to when its parameters are divided over an `ep` axis. Both directions of
`AllToAllDispatcher` are permutations around one uneven all-to-all, so every backward pass is a gather by the inverse
permutation. Shape suffixes: N tokens of this process, K experts a token, R = N * K rows sent, M rows that this
process's experts receive, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from automodel.kernels.permute import (
    ExpertOrder,
    combine_rows,
    permute_rows,
    rows_by_expert,
    sort_by_expert,
    sum_by_token,
)


@dataclass(frozen=True, slots=True)
class DispatchState:
    """What `combine` needs to undo a `dispatch`.

    Attributes:
        order: how the (token, choice) pairs of this process were sorted for sending.
        expert_order_M: received rows (grouped by source process) -> rows grouped by local expert.
        source_order_M: its inverse.
        sent: rows sent to each process of the group.
        received: rows received from each process of the group.
    """

    order: ExpertOrder
    expert_order_M: Tensor
    source_order_M: Tensor
    sent: list[int]
    received: list[int]


class GroupDispatcher:
    """How the processes of an expert-parallel group divide the experts; they call each method together.

    Chunks are ceil(E / group size), as `DTensor` does with `Shard(0)`: the last processes may hold fewer, or none.

    Args:
        group: the processes that divide the experts.
        num_experts: E, over all of them.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.num_experts = num_experts
        self.size = dist.get_world_size(group)
        self.chunk = -(-num_experts // self.size)
        start = min(dist.get_rank(group) * self.chunk, num_experts)
        self.num_local_experts = min(self.chunk, num_experts - start)

    @property
    def gradient_scale(self) -> float:
        """Factor for the gradients of local experts, 1 / group size.

        The exchange sums them over the group's tokens, while every other gradient is a mean over processes.
        """
        return 1 / self.size


class AllToAllDispatcher(GroupDispatcher):
    """Token exchange by collectives, gloo's or NCCL's."""

    def dispatch(
        self, x_ND: Tensor, expert_index_NK: Tensor, weight_NK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, DispatchState]:
        """Send each token to its K experts.

        Args:
            x_ND: tokens of this process.
            expert_index_NK: expert of each choice, an integer in [0, E).
            weight_NK: weight of each choice, to travel with its row where the experts apply it.

        Returns:
            rows_MD: the tokens that this process's experts received, grouped by expert in ascending order.
            weight_M: weights of the rows, in FP32 or wider; None if none were given.
            counts_E_local: int64 rows of each local expert (no entries where this process holds none).
            state: for `combine`.
        """
        # Chunks are padded to the same length, so that the counts travel in an even exchange.
        order = sort_by_expert(expert_index_NK, self.size * self.chunk)
        sent_counts = order.counts_E.long().view(self.size, self.chunk)
        received_counts = torch.empty_like(sent_counts)
        dist.all_to_all_single(received_counts, sent_counts, group=self.group)
        # The only wait for the device: the host has to know the sizes of the exchange.
        sent, received = torch.stack([sent_counts.sum(1), received_counts.sum(1)]).tolist()

        expert_M = torch.arange(self.chunk, device=x_ND.device).repeat(self.size)
        expert_M = torch.repeat_interleave(expert_M, received_counts.flatten(), output_size=sum(received))
        expert_order_M = torch.argsort(expert_M, stable=True)
        source_order_M = torch.empty_like(expert_order_M)
        source_order_M[expert_order_M] = torch.arange(len(expert_order_M), device=x_ND.device)

        rows_MD = _AllToAll.apply(rows_by_expert(x_ND, order), received, sent, self.group)
        rows_MD = permute_rows(rows_MD, expert_order_M, source_order_M)
        weight_M = None
        if weight_NK is not None:
            wide_NK = weight_NK.to(torch.promote_types(weight_NK.dtype, torch.float32))
            sent_M = permute_rows(wide_NK.reshape(-1, 1), order.order_M, order.inverse_M)
            received_M = _AllToAll.apply(sent_M, received, sent, self.group)
            weight_M = permute_rows(received_M, expert_order_M, source_order_M).squeeze(1)
        state = DispatchState(order, expert_order_M, source_order_M, sent, received)
        return rows_MD, weight_M, received_counts.sum(0)[: self.num_local_experts], state

    def combine(self, rows_MD: Tensor, weight_NK: Tensor | None, state: DispatchState) -> Tensor:
        """Return the experts' rows to their tokens and add them up, weighted.

        Args:
            rows_MD: results, in the order of `dispatch`'s rows.
            weight_NK: weight of each choice; None where the experts applied it.
            state: from `dispatch`.

        Returns:
            out_ND: for each token, the sum over its K choices of weight times row.
        """
        rows_MD = permute_rows(rows_MD, state.source_order_M, state.expert_order_M)
        rows_RD = _AllToAll.apply(rows_MD, state.sent, state.received, self.group)
        return (
            sum_by_token(rows_RD, state.order) if weight_NK is None else combine_rows(rows_RD, weight_NK, state.order)
        )


class _AllToAll(torch.autograd.Function):
    """Rows to the other processes and theirs to us; the gradient takes the way back."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.exchange = (received, sent, group)
        return _exchange(rows, received, sent, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        received, sent, group = ctx.exchange
        return _exchange(grad, sent, received, group), None, None, None


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
