"""The experts of one mixture-of-experts layer: stacked parameters, and how rows reach them.

With all experts in this process, tokens are sorted by expert and combined here. When parallel code shards the
experts over a mesh axis it sets `Experts.dispatcher`, which carries rows to the process that holds their expert.

Legend: N tokens, K experts per token, D hidden, F expert width, E experts, M rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.distributed.tensor import DTensor

from automodel.backends import Backend, resolve_experts
from automodel.kernels.experts import expert_mlp
from automodel.kernels.permute import combine_rows, rows_by_expert, sort_by_expert


class Dispatcher(Protocol):
    """What expert-parallel code offers to `Experts`; both methods are differentiable.

    Attributes:
        gradient_scale: factor on the gradients of the local experts. Their rows arrive from every process of the
            axis, so that the gradient is a sum where data parallelism expects a mean.
    """

    gradient_scale: float

    def dispatch(self, x_ND: torch.Tensor, expert_index_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, object]:
        """Rows [M, D] sorted by local expert, the number of rows of each local expert, and state for `combine`."""
        ...

    def combine(self, rows_MD: torch.Tensor, weight_NK: torch.Tensor, state: object) -> torch.Tensor:
        """Rows sent back to their tokens and summed with the routing weights: [N, D]."""
        ...


class Experts(nn.Module):
    """E gated MLPs over rows chosen by a router.

    Args:
        num_experts: E, of the whole layer.
        hidden_size: D.
        width: F.
        activation: of the gate half.
        backend: which kernel multiplies.

    Attributes:
        gate_up_proj: [E, 2F, D], gate rows then up rows.
        down_proj: [E, D, F].
        dispatcher: None while all experts are in this process.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        width: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        backend: Backend,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.activation = activation
        self.backend = backend
        self.dispatcher: Dispatcher | None = None
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def forward(self, x_ND: torch.Tensor, expert_index_NK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, D]: the outputs of the K chosen experts, weighted by `weight_NK` and summed."""
        gate_up, down = _local(self.gate_up_proj), _local(self.down_proj)
        if self.dispatcher is None:
            order = sort_by_expert(expert_index_NK, self.num_experts)
            rows_MD = self._multiply(rows_by_expert(x_ND, order), order.counts_E, gate_up, down)
            return combine_rows(rows_MD, weight_NK, order)
        gate_up = _ScaleGradient.apply(gate_up, self.dispatcher.gradient_scale)
        down = _ScaleGradient.apply(down, self.dispatcher.gradient_scale)
        rows_MD, counts, state = self.dispatcher.dispatch(x_ND, expert_index_NK)
        return self.dispatcher.combine(self._multiply(rows_MD, counts, gate_up, down), weight_NK, state)

    def _multiply(
        self, rows_MD: torch.Tensor, counts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        kernel = resolve_experts(self.backend, rows_MD.device, rows_MD.dtype, rows_MD.shape[-1], down.shape[-1]).kernel
        return expert_mlp(rows_MD, counts, gate_up, down, kernel, self.activation)

    def extra_repr(self) -> str:
        _, hidden, width = self.down_proj.shape
        return f"num_experts={self.num_experts}, hidden_size={hidden}, width={width}"


class _ScaleGradient(torch.autograd.Function):
    """Identity forward; the gradient times a constant."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.scale, None


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter that is sharded over an expert axis."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
