"""The two kinds of feed-forward layer: one gated MLP, or a router over many.

Legend: B batch, S sequence, D hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import nn

from automodel.backends import Backend
from automodel.kernels.activations import Gated
from automodel.models.spec import DecoderSpec, MoeSpec
from automodel.moe.experts import Experts
from automodel.moe.group_router import GroupLimitedRouter
from automodel.moe.router import TopKRouter


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)); gate and up are one projection, gate rows first."""

    def __init__(self, spec: DecoderSpec, width: int | None = None) -> None:
        super().__init__()
        width = width or spec.mlp_width
        self.activation = spec.activation
        self.gate_up_proj = nn.Linear(spec.hidden_size, 2 * width, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(width, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, None]:
        gate, up = self.gate_up_proj(x_BSD).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up), None


class MoeMLP(nn.Module):
    """A router and the experts that it chooses from, and in some families experts that every token goes through."""

    def __init__(self, spec: DecoderSpec, moe: MoeSpec, backend: Backend) -> None:
        super().__init__()
        self.jitter = moe.jitter
        self.gate = _router(spec.hidden_size, moe)
        activation = moe.activation or Gated(spec.activation)
        self.experts = Experts(moe.num_experts, spec.hidden_size, moe.width, activation, backend, bias=moe.bias)
        self.shared_experts = GatedMLP(spec, moe.shared_width) if moe.shared_width else None
        self.shared_expert_gate = nn.Linear(spec.hidden_size, 1, bias=False) if moe.shared_gate else None

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output [B, S, D] and its router logits [B * S, E]."""
        x_ND = x_BSD.flatten(0, 1)
        if self.training and self.jitter > 0:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_NE, weight_NK, index_NK = self.gate(x_ND)
        output_BSD = self.experts(x_ND, index_NK, weight_NK).view_as(x_BSD)
        if self.shared_experts is not None:
            shared_BSD = self.shared_experts(x_BSD)[0]
            if self.shared_expert_gate is not None:
                shared_BSD = shared_BSD * self.shared_expert_gate(x_BSD).sigmoid()
            output_BSD = output_BSD + shared_BSD
        return output_BSD, logits_NE


def _router(hidden_size: int, moe: MoeSpec) -> TopKRouter | GroupLimitedRouter:
    if moe.groups is None:
        return TopKRouter(
            hidden_size,
            moe.num_experts,
            moe.top_k,
            normalize=moe.normalize,
            float32_weights=moe.float32_weights,
            bias=moe.router_bias,
            softmax_over_chosen=moe.softmax_over_chosen,
        )
    return GroupLimitedRouter(
        hidden_size,
        moe.num_experts,
        moe.top_k,
        num_groups=moe.groups.num_groups,
        top_groups=moe.groups.top_groups,
        normalize=moe.normalize,
        scale=moe.groups.scale,
    )
