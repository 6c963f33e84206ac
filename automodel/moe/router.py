"""The router of a mixture-of-experts layer, and the loss that balances the load of its experts.

Legend: N tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from automodel.backends import Backend
from automodel.expert_backends import resolve_router
from automodel.kernels.choice import choose_experts


class TopKRouter(nn.Module):
    """Softmax over all experts in FP32, then the K largest; or the K largest logits, and the softmax over those.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K.
        normalize: divide the K probabilities by their sum.
        float32_weights: return the routing weights in FP32 instead of the dtype of the logits.
        bias: of the projection.
        softmax_over_chosen: choose before the softmax; the weights then sum to 1 without being normalised.
        backend: which kernel chooses.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        backend: Backend,
        *,
        normalize: bool,
        float32_weights: bool = False,
        bias: bool = False,
        softmax_over_chosen: bool = False,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.top_k = top_k
        self.normalize = normalize
        self.float32_weights = float32_weights
        self.softmax_over_chosen = softmax_over_chosen
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_experts)) if bias else None)

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [N, E], routing weights [N, K] and expert indices [N, K] (int64), largest first."""
        logits_NE = F.linear(x_ND, self.weight, self.bias)
        if resolve_router(self.backend, logits_NE.device, logits_NE.shape[1]).kernel == "fused":
            dtype = torch.float32 if self.float32_weights else logits_NE.dtype
            over_chosen = self.softmax_over_chosen or self.normalize
            weight_NK, index_NK = choose_experts(logits_NE, self.top_k, dtype, over_chosen=over_chosen)
            return logits_NE, weight_NK, index_NK
        if self.softmax_over_chosen:
            chosen_NK, index_NK = torch.topk(logits_NE, self.top_k, dim=-1)
            weight_NK = torch.softmax(chosen_NK, dim=-1, dtype=torch.float32)
        else:
            probabilities_NE = torch.softmax(logits_NE, dim=-1, dtype=torch.float32)
            weight_NK, index_NK = torch.topk(probabilities_NE, self.top_k, dim=-1)
        if self.normalize:
            weight_NK = weight_NK / weight_NK.sum(dim=-1, keepdim=True)
        if not self.float32_weights:
            weight_NK = weight_NK.to(logits_NE.dtype)
        return logits_NE, weight_NK, index_NK

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        return f"hidden_size={hidden}, num_experts={experts}, top_k={self.top_k}, normalize={self.normalize}"


def load_balancing_loss(
    router_logits: Sequence[torch.Tensor], top_k: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Auxiliary loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6), over all layers together.

    E * sum over experts of (share of choices that went to the expert) * (mean probability of the expert): K when
    the load is balanced, as transformers computes it.

    Args:
        router_logits: [N, E] of each layer; N = batch * sequence.
        top_k: K.
        attention_mask: [B, S] with 0 at padding, which does not count; None counts every token.

    Returns:
        A scalar in FP32.
    """
    num_experts = router_logits[0].shape[-1]
    mask_N = None if attention_mask is None else attention_mask.reshape(-1).to(torch.float32)
    choices_E = probabilities_E = rows = 0.0
    for logits_NE in router_logits:
        weight_NE = torch.softmax(logits_NE, dim=-1)
        chosen_NK = torch.topk(weight_NE, top_k, dim=-1).indices
        chosen_NE = torch.zeros_like(weight_NE, dtype=torch.float32).scatter_(1, chosen_NK, 1.0)
        weight_NE = weight_NE.float()
        if mask_N is not None:
            chosen_NE = chosen_NE * mask_N.unsqueeze(-1)
            weight_NE = weight_NE * mask_N.unsqueeze(-1)
        choices_E = choices_E + chosen_NE.sum(0)
        probabilities_E = probabilities_E + weight_NE.sum(0)
        rows = rows + (logits_NE.shape[0] if mask_N is None else mask_N.sum())
    return num_experts * torch.sum((choices_E / rows) * (probabilities_E / rows))
