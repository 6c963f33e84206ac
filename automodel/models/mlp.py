"""The kinds of feed-forward layer: one MLP, gated or not, or a router over many.

Legend: B batch, S sequence, D hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import nn

from automodel.backends import Backend
from automodel.kernels.activations import Gated, Ungated
from automodel.models.linear import Linear
from automodel.models.spec import DecoderSpec, MoeSpec
from automodel.moe.experts import Experts
from automodel.moe.group_router import GroupLimitedRouter
from automodel.moe.router import TopKRouter
from automodel.precision import uncompiled


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)); gate and up are one projection, gate rows first."""

    def __init__(self, spec: DecoderSpec, backend: Backend, width: int | None = None) -> None:
        super().__init__()
        width = width or spec.mlp_width
        self.activation = spec.activation
        self.gate_up_proj = Linear(spec.hidden_size, 2 * width, backend, bias=spec.mlp_bias)
        self.down_proj = Linear(width, spec.hidden_size, backend, bias=spec.mlp_bias)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, None]:
        gate, up = self.gate_up_proj(x_BSD).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up), None


class PlainMLP(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, spec: DecoderSpec, backend: Backend, width: int | None = None) -> None:
        super().__init__()
        width = width or spec.mlp_width
        self.activation = spec.activation
        self.up_proj = Linear(spec.hidden_size, width, backend, bias=spec.mlp_bias)
        self.down_proj = Linear(width, spec.hidden_size, backend, bias=spec.mlp_bias)

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.down_proj(self.activation(self.up_proj(x_BSD))), None


class MoeMLP(nn.Module):
    """A router and the experts that it chooses from, and in some families experts that every token goes through.

    The chosen experts may work in a narrower space (`latent_size`), which the router and the shared experts do not.
    """

    def __init__(self, spec: DecoderSpec, moe: MoeSpec, backend: Backend) -> None:
        super().__init__()
        self.jitter = moe.jitter
        self.gate = _router(spec.hidden_size, moe, backend)
        activation = moe.activation or Gated(spec.activation)
        hidden, latent = spec.hidden_size, moe.latent_size
        self.experts = Experts(moe.num_experts, latent or hidden, moe.width, activation, backend, bias=moe.bias)
        shared = PlainMLP if isinstance(activation, Ungated) else GatedMLP
        self.shared_experts = shared(spec, backend, moe.shared_width) if moe.shared_width else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if moe.shared_gate else None
        self.fc1_latent_proj = Linear(hidden, latent, backend, bias=spec.mlp_bias) if latent else None
        self.fc2_latent_proj = Linear(latent, hidden, backend, bias=spec.mlp_bias) if latent else None

    def forward(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output [B, S, D] and its router logits [B * S, E]."""
        x_ND = x_BSD.flatten(0, 1)
        if self.training and self.jitter > 0:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.jitter, 1 + self.jitter)
        apart = getattr(self.gate, "keeps_float32", False)
        logits_NE, weight_NK, index_NK = uncompiled(self.gate, x_ND) if apart else self.gate(x_ND)
        if self.fc1_latent_proj is None or self.fc2_latent_proj is None:
            output_ND = self.experts(x_ND, index_NK, weight_NK)
        else:
            output_ND = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(x_ND), index_NK, weight_NK))
        output_BSD = output_ND.view_as(x_BSD)
        if self.shared_experts is not None:
            shared_BSD = self.shared_experts(x_BSD)[0]
            if self.shared_expert_gate is not None:
                shared_BSD = shared_BSD * self.shared_expert_gate(x_BSD).sigmoid()
            output_BSD = output_BSD + shared_BSD
        return output_BSD, logits_NE


def _router(hidden_size: int, moe: MoeSpec, backend: Backend) -> TopKRouter | GroupLimitedRouter:
    if moe.groups is None:
        return TopKRouter(
            hidden_size,
            moe.num_experts,
            moe.top_k,
            backend,
            normalize=moe.normalize,
            float32_weights=moe.float32_weights,
            bias=moe.router_bias,
            softmax_over_chosen=moe.softmax_over_chosen,
        )
    return GroupLimitedRouter(
        hidden_size,
        moe.num_experts,
        moe.top_k,
        backend,
        num_groups=moe.groups.num_groups,
        top_groups=moe.groups.top_groups,
        normalize=moe.normalize,
        scale=moe.groups.scale,
        keeps_float32=moe.groups.keeps_float32,
    )
