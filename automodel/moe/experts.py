"""The experts of one mixture-of-experts layer: stacked parameters, and how rows reach them.

With all experts in this process, tokens are sorted by expert and combined here. When parallel code shards the
experts over a mesh axis it sets `Experts.dispatcher`, which carries rows to the process that holds their expert, and
`Experts.peers`, through which those processes read each other's memory where they can.

Legend: N tokens, K experts per token, D hidden, F expert width, E experts, M rows.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from automodel.backends import Backend, DispatchKernel, Resolved
from automodel.expert_backends import WEIGHING, resolve_dispatch, resolve_experts
from automodel.kernels.activations import GatedActivation, Ungated
from automodel.kernels.experts import ExpertsKernel, expert_mlp
from automodel.kernels.permute import combine_rows, rows_by_expert, sort_by_expert
from automodel.kernels.sonic import sonic_experts
from automodel.moe.peers import Peers
from automodel.parallel.local import local_part


class Dispatcher(Protocol):
    """What expert-parallel code offers to `Experts`; both methods are differentiable.

    Attributes:
        gradient_scale: factor on the gradients of the local experts. Their rows arrive from every process of the
            axis, so that the gradient is a sum where data parallelism expects a mean.
    """

    gradient_scale: float

    def dispatch(
        self, x_ND: torch.Tensor, expert_index_NK: torch.Tensor, weight_NK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, object]:
        """Rows [M, D] sorted by local expert, their routing weights [M] if given any, the number of rows of each
        local expert, and state for `combine`."""
        ...

    def combine(self, rows_MD: torch.Tensor, weight_NK: torch.Tensor | None, state: object) -> torch.Tensor:
        """Rows sent back to their tokens and summed, with the routing weights if given any: [N, D]."""
        ...


class Experts(nn.Module):
    """E MLPs, gated or not, over rows chosen by a router.

    Args:
        num_experts: E, of the whole layer.
        hidden_size: D.
        width: F.
        activation: of the gate half and the up half; `Ungated` for experts without a gate.
        backend: which kernel multiplies.
        bias: whether both projections carry one.

    Attributes:
        gate_up_proj: [E, 2F, D], gate rows then up rows. Experts without a gate have `up_proj` [E, F, D] in its place.
        gate_up_proj_bias: [E, 2F], or None; `up_proj_bias` [E, F] without a gate.
        down_proj: [E, D, F].
        down_proj_bias: [E, D], or None. Being the expert's own, it is weighted by the router like the rest.
        dispatcher: None while all experts are in this process.
        peers: with a dispatcher, the memory of the processes that divide the experts, or why there is none.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        width: int,
        activation: GatedActivation | Ungated,
        backend: Backend,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.activation = activation
        self.backend = backend
        self.dispatcher: Dispatcher | None = None
        self.peers: Peers | str = "the processes have not been asked for their memory"
        self.first, rows = ("up_proj", width) if isinstance(activation, Ungated) else ("gate_up_proj", 2 * width)
        self.register_parameter(self.first, nn.Parameter(torch.empty(num_experts, rows, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        for name, size in ((f"{self.first}_bias", rows), ("down_proj_bias", hidden_size)):
            self.register_parameter(name, nn.Parameter(torch.zeros(num_experts, size)) if bias else None)

    def forward(self, x_ND: torch.Tensor, expert_index_NK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, D]: the outputs of the K chosen experts, weighted by `weight_NK` and summed."""
        kernel = self.kernel_for(x_ND)
        if self.dispatcher is not None and self.resolve_dispatch(kernel).kernel == "symmetric":
            return self._through_peers(x_ND, expert_index_NK, weight_NK)
        if kernel in WEIGHING:
            return self._weighing(x_ND, expert_index_NK, weight_NK, kernel)
        if self.dispatcher is not None:
            return self._dispatched(self.dispatcher, x_ND, expert_index_NK, weight_NK, kernel)
        order = sort_by_expert(expert_index_NK, self.num_experts)
        rows_MD = self._multiply(rows_by_expert(x_ND, order), order.counts_E, kernel)
        return combine_rows(rows_MD, weight_NK, order)

    @torch.compiler.disable
    def _dispatched(
        self,
        dispatcher: Dispatcher,
        x_ND: torch.Tensor,
        expert_index_NK: torch.Tensor,
        weight_NK: torch.Tensor,
        kernel: ExpertsKernel,
    ) -> torch.Tensor:
        rows_MD, _, counts, state = dispatcher.dispatch(x_ND, expert_index_NK)
        return dispatcher.combine(self._multiply(rows_MD, counts, kernel), weight_NK, state)

    def resolve_dispatch(self, kernel: ExpertsKernel) -> Resolved[DispatchKernel]:
        """How tokens reach the experts' processes, where there is a dispatcher and `kernel` multiplies."""
        return resolve_dispatch(self.backend, kernel, self.peers if isinstance(self.peers, str) else None)

    def kernel_for(self, x: torch.Tensor) -> ExpertsKernel:
        """Which kernel runs on the device and in the dtype of `x`."""
        return self.kernel_on(x.device, x.dtype)

    def kernel_on(self, device: torch.device, dtype: torch.dtype) -> ExpertsKernel:
        """Which kernel runs on rows there."""
        _, hidden, width = self.down_proj.shape
        bias = self.down_proj_bias is not None
        return resolve_experts(self.backend, device, dtype, hidden, width, self.activation, bias=bias).kernel

    def _multiply(self, rows_MD: torch.Tensor, counts: torch.Tensor, kernel: ExpertsKernel) -> torch.Tensor:
        gate_up, down, gate_up_bias, down_bias = self._parameters_here()
        return expert_mlp(
            rows_MD,
            counts,
            gate_up,
            down,
            kernel,
            self.activation,
            gate_up_bias_E2F=gate_up_bias,
            down_bias_ED=down_bias,
        )

    @torch.compiler.disable
    def _weighing(
        self, x_ND: torch.Tensor, expert_index_NK: torch.Tensor, weight_NK: torch.Tensor, kernel: ExpertsKernel
    ) -> torch.Tensor:
        from automodel.kernels.fused_experts import fused_experts
        from automodel.kernels.triton_rows import activation_form

        gate_up, down, gate_up_bias, down_bias = self._parameters_here()
        if kernel == "sonic":
            run = partial(sonic_experts, gate_up_E2FD=gate_up, down_EDF=down, activation=self.activation)
        else:
            run = partial(
                fused_experts,
                gate_up_E2FD=gate_up,
                down_EDF=down,
                form=activation_form(self.activation),
                gate_up_bias_E2F=gate_up_bias,
                down_bias_ED=down_bias,
            )
        if self.dispatcher is None:
            order = sort_by_expert(expert_index_NK, self.num_experts)
            return run(x_ND, weight_NK, order.counts_E, order=order)
        rows_MD, weight_M, counts, state = self.dispatcher.dispatch(x_ND, expert_index_NK, weight_NK)
        return self.dispatcher.combine(run(rows_MD, weight_M, counts), None, state)

    @torch.compiler.disable
    def _through_peers(
        self, x_ND: torch.Tensor, expert_index_NK: torch.Tensor, weight_NK: torch.Tensor
    ) -> torch.Tensor:
        from automodel.kernels.triton_rows import activation_form
        from automodel.moe.symmetric import ExpertsOfPeers, experts_of_peers

        parameters = self._parameters_here(scaled=False)
        chunk = -(-self.num_experts // self.peers.size)
        layer = ExpertsOfPeers(self.peers, chunk, len(parameters[1]), activation_form(self.activation))
        return experts_of_peers(x_ND, expert_index_NK, weight_NK, layer, *parameters)

    def _parameters_here(self, *, scaled: bool = True) -> list[torch.Tensor | None]:
        """This process's part of the two projections and their biases; their gradients are scaled on the way back."""
        scale = self.dispatcher.gradient_scale if scaled and self.dispatcher is not None else 1.0
        names = (self.first, "down_proj", f"{self.first}_bias", "down_proj_bias")
        parameters = (getattr(self, name) for name in names)
        return [None if parameter is None else _scaled(local_part(parameter), scale) for parameter in parameters]

    def extra_repr(self) -> str:
        _, hidden, width = self.down_proj.shape
        bias = self.down_proj_bias is not None
        return f"num_experts={self.num_experts}, hidden_size={hidden}, width={width}, bias={bias}"


class _ScaleGradient(torch.autograd.Function):
    """Identity forward; the gradient times a constant."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.scale, None


def _scaled(part: torch.Tensor, gradient_scale: float) -> torch.Tensor:
    return part if gradient_scale == 1.0 else _ScaleGradient.apply(part, gradient_scale)
