"""The two kinds of feed-forward layer: one gated MLP, or a router over many.

Legend: B batch, S sequence, D hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import nn

from automodel.backends import Backend
from automodel.models.spec import DecoderSpec, MoeSpec
from automodel.moe.experts import Experts
from automodel.moe.router import TopKRouter


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)); gate and up are one projection, gate rows first."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate_up_proj = nn.Linear(spec.hidden_size, 2 * spec.mlp_width, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.mlp_width, spec.hidden_size, bias=spec.mlp_bias)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, None]:
        gate, up = self.gate_up_proj(x_BSD).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up), None


class MoeMLP(nn.Module):
    """A router and the experts that it chooses from."""

    def __init__(self, spec: DecoderSpec, moe: MoeSpec, backend: Backend) -> None:
        super().__init__()
        self.jitter = moe.jitter
        self.gate = TopKRouter(
            spec.hidden_size,
            moe.num_experts,
            moe.top_k,
            normalize=moe.normalize,
            float32_weights=moe.float32_weights,
        )
        self.experts = Experts(moe.num_experts, spec.hidden_size, moe.width, spec.activation, backend)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output [B, S, D] and its router logits [B * S, E]."""
        x_ND = x_BSD.flatten(0, 1)
        if self.training and self.jitter > 0:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_NE, weight_NK, index_NK = self.gate(x_ND)
        return self.experts(x_ND, index_NK, weight_NK).view_as(x_BSD), logits_NE
