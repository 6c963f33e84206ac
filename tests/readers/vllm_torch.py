"""What vLLM's CPU build lacks: experts without a gate (Nemotron-H's squared ReLU), and sigmoid scores without groups.

The build refuses the former when it reads the config and has no kernel; the latter (MiniMax-M2) are one group of all
experts to its own grouped routine. Weight loading, routing and the rest stay vLLM's.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.router import cpu_router, router_factory

GATELESS = MoEActivation.RELU2_NO_MUL


class OneGroup(cpu_router.CPURouter):
    """A router that takes sigmoid scores without groups as one group."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        if self.scoring_func == "sigmoid" and not self.use_grouped_topk:
            self.use_grouped_topk, self.num_expert_group, self.topk_group = True, 1, 1


def install(model_type: str) -> None:
    """Replace what vLLM's CPU build lacks for this `model_type`, if anything."""
    if model_type == "minimax_m2":
        router_factory.CPURouter = OneGroup
    if model_type != "nemotron_h":
        return
    refuse, supports = FusedMoEConfig.__post_init__, CPUUnquantizedExperts._supports_activation
    prepare, compute = CPUUnquantizedExperts.process_weights_after_loading, CPUUnquantizedExperts.apply

    def accept(self: FusedMoEConfig) -> None:
        try:
            refuse(self)
        except NotImplementedError as error:
            if "is_act_and_mul" not in str(error):
                raise

    def keep_weights(self: CPUUnquantizedExperts, layer: torch.nn.Module) -> None:
        if self.moe_config.activation != GATELESS:
            prepare(self, layer)
        else:
            self._use_zentorch = False

    def apply(
        self: CPUUnquantizedExperts,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        *others: object,
        **named: object,
    ) -> None:
        if activation != GATELESS:
            compute(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, *others, **named)
        else:
            output.copy_(_squared_relu_experts(hidden_states, w1, w2, topk_weights, topk_ids))

    FusedMoEConfig.__post_init__ = accept
    CPUUnquantizedExperts._supports_no_act_and_mul = staticmethod(lambda: True)
    CPUUnquantizedExperts._supports_activation = staticmethod(lambda asked: asked == GATELESS or supports(asked))
    CPUUnquantizedExperts.process_weights_after_loading = keep_weights
    CPUUnquantizedExperts.apply = apply


def _squared_relu_experts(
    x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """`[N, D]`: down(relu(up x)^2) of every chosen expert, weighted."""
    total = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        hidden = F.relu(F.linear(x[rows], up[expert])).square()
        total.index_add_(0, rows, F.linear(hidden, down[expert]) * weights[rows, slots, None].to(x))
    return total
