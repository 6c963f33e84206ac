"""The router of DeepSeek V3 (arXiv 2412.19437, section 2.1.2): sigmoid scores, and a choice limited to the best groups
of experts that a bias corrects to balance the load.

Legend: N tokens, D hidden, E experts, K experts per token, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from automodel.backends import Backend
from automodel.expert_backends import resolve_router
from automodel.kernels.float32_linear import float32_linear
from automodel.kernels.group_choice import choose_in_groups
from automodel.precision import keep_float32

_NEAR_ZERO = 1e-20


class GroupLimitedRouter(nn.Module):
    """The K experts of the largest corrected scores within the best groups; everything in FP32.

    A group is as good as the sum of its two best corrected scores. Groups that are not chosen are out of the question
    whatever the bias, as in transformers 5; 4.57 gives their experts the score 0.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: K.
        num_groups: G, a divisor of E.
        top_groups: groups that the experts of a token come from.
        normalize: divide the K scores by their sum.
        scale: factor on the routing weights.
        keeps_float32: the projection's weight is FP32 whatever the module is cast to, as it is published (Nemotron 3).
        backend: which kernels project and choose.

    Attributes:
        e_score_correction_bias: [E], added to the scores for the choice alone. No gradient reaches it. A buffer, so
            that mixed precision does not cast it, and FP32 whatever the module is cast to: it tells apart scores that
            are the same in BF16.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        backend: Backend,
        *,
        num_groups: int,
        top_groups: int,
        normalize: bool,
        scale: float,
        keeps_float32: bool = False,
    ) -> None:
        super().__init__()
        self.keeps_float32 = keeps_float32
        self.backend = backend
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.normalize = normalize
        self.scale = scale
        dtype = torch.float32 if keeps_float32 else None
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GroupLimitedRouter:
        exact = self.e_score_correction_bias
        super()._apply(keep_float32(fn) if self.keeps_float32 else fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = exact.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [N, E] and routing weights [N, K] in FP32, and expert indices [N, K] (int64)."""
        experts = self.weight.shape[0]
        if resolve_router(self.backend, x_ND.device, experts).kernel == "fused":
            logits_NE = float32_linear(x_ND, self.weight)
            weight_NK, index_NK = choose_in_groups(
                logits_NE,
                self.e_score_correction_bias,
                self.top_k,
                groups=self.num_groups,
                top_groups=self.top_groups,
                normalize=self.normalize,
                scale=self.scale,
            )
            return logits_NE, weight_NK, index_NK
        logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid()
        index_NK = self._choose(scores_NE)
        weight_NK = scores_NE.gather(1, index_NK)
        if self.normalize:
            weight_NK = weight_NK / (weight_NK.sum(dim=-1, keepdim=True) + _NEAR_ZERO)
        return logits_NE, weight_NK * self.scale, index_NK

    @torch.no_grad()
    def _choose(self, scores_NE: torch.Tensor) -> torch.Tensor:
        corrected_NE = scores_NE + self.e_score_correction_bias
        if self.top_groups < self.num_groups:
            grouped_NGe = corrected_NE.unflatten(1, (self.num_groups, -1))
            quality_NG = grouped_NGe.topk(2, dim=-1).values.sum(dim=-1)
            best = quality_NG.topk(self.top_groups, dim=-1).indices
            refused_NG = torch.ones_like(quality_NG, dtype=torch.bool).scatter_(1, best, False)
            corrected_NE = grouped_NGe.masked_fill(refused_NG.unsqueeze(-1), -torch.inf).flatten(1)
        return corrected_NE.topk(self.top_k, dim=-1).indices

    def extra_repr(self) -> str:
        experts, hidden = self.weight.shape
        return (
            f"hidden_size={hidden}, num_experts={experts}, top_k={self.top_k}, num_groups={self.num_groups}, "
            f"top_groups={self.top_groups}, normalize={self.normalize}, scale={self.scale}"
        )
