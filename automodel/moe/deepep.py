"""Tokens to the processes that hold their experts and back, with gradients, through the kernels of DeepEP.

On one host, in its normal mode: a process sends a token once to each process that holds some of its experts, and adds
up the token's rows before they travel home. The rows are copied from tokens, and added up, here. The host waits for
the number of tokens that it receives, once a dispatch; backward passes know it.

Legend: N tokens of this process, K experts a token, R tokens received, M rows of this process's experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from automodel.backends import refuse
from automodel.kernels.packages import is_installed
from automodel.kernels.permute import ExpertOrder, gather, sort_by_expert, token_sums
from automodel.moe.dispatch import GroupDispatcher
from automodel.moe.peers import host_name
from automodel.parallel.agree import gather_objects
from ckpt_tools.core.errors import UsageError

_GROUP_SIZES = (2, 4, 8)
_COLUMNS, _MOST_COLUMNS = 16, 8176
"""What the intranode kernels take: rows in two halves of whole 16 bytes, each of less than 8 KiB."""
_buffers: dict[dist.ProcessGroup, Any] = {}


@dataclass(frozen=True, slots=True)
class DeepEPState:
    """What `combine` and the backward passes need to undo a `dispatch`.

    Attributes:
        order: the received (token, choice) pairs sorted by local expert, those of other processes' experts last.
        rows: M, the pairs of experts here.
        handle: DeepEP's own.
    """

    order: ExpertOrder
    rows: int
    handle: tuple[Tensor, ...]


class DeepEPDispatcher(GroupDispatcher):
    """Token exchange by DeepEP, for experts that apply the routing weights themselves.

    Args:
        buffer: a `deep_ep.Buffer` of the group, see `open_buffer`.
    """

    def __init__(self, buffer: Any, group: dist.ProcessGroup, num_experts: int) -> None:
        super().__init__(group, num_experts)
        self.buffer = buffer

    def dispatch(
        self, x_ND: Tensor, expert_index_NK: Tensor, weight_NK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, DeepEPState]:
        """Rows [M, D] sorted by local expert, their weights [M] in FP32, the rows of each local expert, and state for
        `combine`.

        Args:
            x_ND: tokens of this process, BF16.
            expert_index_NK: expert of each choice, int64.
            weight_NK: weight of each choice.

        Raises:
            UsageError: no weights were given.
        """
        if weight_NK is None:
            raise UsageError("DeepEP adds up the rows of a token where its experts are: send their weights with them")
        rows_MD, weight_M, state = _Dispatch.apply(x_ND, weight_NK, expert_index_NK, self.buffer, self.size, self.chunk)
        return rows_MD, weight_M, state.order.counts_E[: self.num_local_experts], state

    def combine(self, rows_MD: Tensor, weight_NK: Tensor | None, state: DeepEPState) -> Tensor:
        """The rows of each token, weighted already, added up: [N, D].

        Raises:
            UsageError: weights were given.
        """
        if weight_NK is not None:
            raise UsageError("DeepEP adds up the rows of a token where its experts are: weight them there")
        out: Tensor = _Combine.apply(rows_MD, state, self.buffer)
        return out


class _Dispatch(torch.autograd.Function):
    """Tokens to processes, and there to rows; the gradient takes the way back, with that of the weights."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, index: Tensor, buffer: Any, size: int, chunk: int
    ) -> tuple[Tensor, Tensor, DeepEPState]:
        index = index.contiguous()
        # As many experts everywhere, whether or not the last processes hold them.
        tokens_W, _, tokens_E, sent_NW, _ = buffer.get_dispatch_layout(index, size * chunk)
        tokens_RD, index_RK, weight_RK, counts, handle, _ = buffer.dispatch(
            x.contiguous(),
            topk_idx=index,
            topk_weights=weight.float().contiguous(),
            num_tokens_per_rank=tokens_W,
            num_tokens_per_expert=tokens_E,
            is_token_in_rank=sent_NW,
        )
        order = sort_by_expert(torch.where(index_RK < 0, chunk, index_RK), chunk + 1)
        ctx.state = state = DeepEPState(order, sum(counts), handle)
        ctx.buffer, ctx.weight_dtype = buffer, weight.dtype
        here = slice(0, state.rows)
        return gather(tokens_RD, order.token_M[here]), weight_RK.flatten()[order.order_M[here]], state

    @staticmethod
    def backward(ctx: FunctionCtx, grad_MD: Tensor, grad_M: Tensor, _state: None) -> tuple[Tensor | None, ...]:
        order, rows = ctx.state.order, ctx.state.rows
        pairs = len(order.inverse_M)
        grad_RD = token_sums(grad_MD.contiguous(), order.inverse_M, order.top_k)
        grad_RK = F.pad(grad_M.float(), (0, pairs - rows))[order.inverse_M].view(-1, order.top_k)
        grad_x, grad_weight, _ = ctx.buffer.combine(grad_RD, ctx.state.handle, topk_weights=grad_RK)
        return grad_x, grad_weight.to(ctx.weight_dtype), None, None, None, None


class _Combine(torch.autograd.Function):
    """Rows added up to tokens, and these sent home; the gradient comes the way that the tokens came."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, state: DeepEPState, buffer: Any) -> Tensor:
        ctx.state, ctx.buffer = state, buffer
        sums_RD = token_sums(rows.contiguous(), state.order.inverse_M, state.order.top_k)
        out: Tensor = buffer.combine(sums_RD, state.handle)[0]
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_RD = ctx.buffer.dispatch(grad.contiguous(), handle=ctx.state.handle)[0]
        return gather(grad_RD, ctx.state.order.token_M[: ctx.state.rows]), None, None


def open_buffer(group: dist.ProcessGroup, device: torch.device, hidden: int) -> Any:
    """DeepEP's buffer of `group` for rows of `hidden` BF16 elements, one for all layers that need no larger one.

    Every process of the group calls it together. Buffers hold their group and live as long as the process.

    Raises:
        UsageError: on all processes, if one of them cannot run DeepEP, or not with the others.
    """
    everyone = gather_objects((_obstacle(device, hidden), host_name()), group)
    hosts = {host for _, host in everyone}
    obstacles = [found for found, _ in everyone if found]
    if len(everyone) not in _GROUP_SIZES:
        obstacles.append(f"the ep axis has {len(everyone)} processes, and DeepEP takes {_GROUP_SIZES} on a host")
    if len(hosts) > 1:
        obstacles.append(f"the ep axis is on {len(hosts)} hosts, and DeepEP is used within one")
    if obstacles:
        refuse("dispatch", "deepep", obstacles[0])
    from deep_ep import Buffer

    configs = Buffer.get_dispatch_config(len(everyone)), Buffer.get_combine_config(len(everyone))
    size = max(config.get_nvl_buffer_size_hint(hidden * torch.bfloat16.itemsize, len(everyone)) for config in configs)
    if group not in _buffers or _buffers[group].num_nvl_bytes < size:
        _buffers[group] = Buffer(group, size)
    return _buffers[group]


def _obstacle(device: torch.device, hidden: int) -> str | None:
    if device.type != "cuda":
        return "DeepEP needs CUDA"
    if not is_installed("deep_ep"):
        return "deep_ep is not installed"
    try:
        import deep_ep
    except (ImportError, OSError, AssertionError) as error:  # it asserts that NCCL is the one that it was built for
        return f"deep_ep cannot be imported: {error}"
    if getattr(deep_ep, "topk_idx_t", torch.int64) != torch.int64:
        return f"deep_ep was built for indices in {deep_ep.topk_idx_t}"
    if hidden % _COLUMNS or hidden > _MOST_COLUMNS:
        return f"DeepEP takes hidden sizes that are multiples of {_COLUMNS} up to {_MOST_COLUMNS}, not {hidden}"
    return None
