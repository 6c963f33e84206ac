"""Moving token rows into expert order and back, with backward passes that gather instead of scatter-adding.

Legend: N tokens, K experts per token, D hidden, E experts, M = N*K rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

from automodel.kernels.packages import is_installed


@dataclass(frozen=True, slots=True)
class ExpertOrder:
    """Where each (token, choice) pair stands once the pairs are sorted by expert.

    Attributes:
        order_M: pair index (token * K + choice) of each sorted row; int64.
        token_M: token of each sorted row; int64.
        inverse_M: sorted row of each pair; int64.
        counts_E: rows of each expert; int32.
        top_k: K.
    """

    order_M: torch.Tensor
    token_M: torch.Tensor
    inverse_M: torch.Tensor
    counts_E: torch.Tensor
    top_k: int


def sort_by_expert(expert_index_NK: torch.Tensor, num_experts: int) -> ExpertOrder:
    """Stable order of all (token, choice) pairs by expert; no host synchronisation.

    Args:
        expert_index_NK: expert of each choice, an integer in [0, num_experts).
        num_experts: E; experts that no token chose get a count of 0.
    """
    top_k = expert_index_NK.shape[1]
    # A radix sort takes as many passes as the keys have bytes.
    pairs_M = expert_index_NK.reshape(-1).to(torch.int16 if num_experts < 2**15 else torch.int32)
    sorted_M, order_M = torch.sort(pairs_M, stable=True)
    inverse_M = torch.empty_like(order_M)
    inverse_M.scatter_(0, order_M, torch.arange(order_M.numel(), device=order_M.device))
    bounds_E = torch.arange(num_experts, device=pairs_M.device, dtype=sorted_M.dtype)
    ends_E = torch.searchsorted(sorted_M, bounds_E, right=True, out_int32=True)
    counts_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    return ExpertOrder(order_M, order_M // top_k, inverse_M, counts_E, top_k)


class _Scatter(torch.autograd.Function):
    """rows[m] = x[token[m]]; the gradient of a token is the sum of its K rows."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x_ND: torch.Tensor, token_M: torch.Tensor, inverse_M: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse_M)
        ctx.top_k = top_k
        return _spread(x_ND, token_M, inverse_M, top_k)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_MD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse_M,) = ctx.saved_tensors
        return token_sums(grad_MD.contiguous(), inverse_M, ctx.top_k), None, None, None


class _Gather(torch.autograd.Function):
    """out[n] = the sum of token n's K rows; the gradient of a row is that of its token."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows_MD: torch.Tensor, token_M: torch.Tensor, inverse_M: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(token_M, inverse_M)
        ctx.top_k = top_k
        return token_sums(rows_MD, inverse_M, top_k)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        token_M, inverse_M = ctx.saved_tensors
        return _spread(grad_ND, token_M, inverse_M, ctx.top_k), None, None, None


class _Permute(torch.autograd.Function):
    """out[i] = rows[inverse[i]]; the gradient goes back through the opposite permutation."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows_MD: torch.Tensor, index_M: torch.Tensor, inverse_M: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse_M)
        return gather(rows_MD, index_M)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_MD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse_M,) = ctx.saved_tensors
        return gather(grad_MD, inverse_M), None, None


def rows_by_expert(x_ND: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """[N, D] -> [M, D]: each token once for every expert it chose, sorted by expert."""
    return _Scatter.apply(x_ND, order.token_M, order.inverse_M, order.top_k)


def sum_by_token(rows_MD: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """[M, D] -> [N, D]: the K rows of each token added up, in FP32."""
    return _Gather.apply(rows_MD, order.token_M, order.inverse_M, order.top_k)


def permute_rows(rows_MD: torch.Tensor, index_M: torch.Tensor, inverse_M: torch.Tensor) -> torch.Tensor:
    """rows[index] for a permutation `index` with the given inverse; the backward pass is a gather too."""
    return _Permute.apply(rows_MD, index_M, inverse_M)


def combine_rows(rows_MD: torch.Tensor, weight_NK: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    """[M, D] -> [N, D]: the K rows of each token times its routing weights, summed in the wider of the two dtypes."""
    pairs_NKD = permute_rows(rows_MD, order.inverse_M, order.order_M).view(-1, order.top_k, rows_MD.shape[-1])
    return (pairs_NKD * weight_NK.unsqueeze(-1)).sum(1).to(rows_MD.dtype)


def token_sums(rows_MD: torch.Tensor, place_NK: torch.Tensor, top_k: int) -> torch.Tensor:
    """For each token the sum of its rows in FP32, [N, D]: `place_NK` [N * K] says where they are, M or more that there
    is none. Not differentiable, like `gather`."""
    if kernels := _triton(rows_MD):
        return kernels.sum_rows(rows_MD, place_NK, top_k)
    with_zeros = F.pad(rows_MD, (0, 0, 0, 1))
    rows = with_zeros.index_select(0, place_NK.clamp(max=len(rows_MD)))
    return rows.view(-1, top_k, rows_MD.shape[-1]).sum(1)


def _spread(x_ND: torch.Tensor, token_M: torch.Tensor, inverse_M: torch.Tensor, top_k: int) -> torch.Tensor:
    if kernels := _triton(x_ND):
        return kernels.spread_rows(x_ND.contiguous(), inverse_M, top_k)
    return x_ND.index_select(0, token_M)


def gather(rows_MD: torch.Tensor, index_M: torch.Tensor) -> torch.Tensor:
    """rows[index], [len(index), D]."""
    if kernels := _triton(rows_MD):
        return kernels.gather_rows(rows_MD.contiguous(), index_M)
    return rows_MD.index_select(0, index_M)


def _triton(x: torch.Tensor) -> ModuleType | None:
    """The kernels of `triton_rows` where they can run."""
    if not x.is_cuda or not is_installed("triton"):
        return None
    from automodel.kernels import triton_rows

    return triton_rows
