"""Qwen3-Next: gated DeltaNet and gated attention in turn, experts with a shared one, zero-centred norms."""

from __future__ import annotations

from torch import nn
from transformers import Qwen3NextConfig

from automodel.compat import PreTrainedConfig
from automodel.models.causal_lm import NativeCausalLM
from automodel.models.predict_layer import PredictBlock
from automodel.models.spec import DecoderSpec, DeltaNetSpec, MoeSpec, decoder_spec


class NeMoQwen3NextForCausalLM(NativeCausalLM):
    """Qwen3-Next with a language-model head, computing what transformers' `Qwen3NextForCausalLM` does.

    The block for multi-token prediction is held where the checkpoint has it, and neither runs nor trains. Packed
    documents (positions that restart) see only themselves; in transformers' class linear attention sees all of the row.
    """

    config_class = Qwen3NextConfig
    transformers_architecture = "Qwen3NextForCausalLM"
    _is_stateful = True
    mtp: nn.Module

    @staticmethod
    def decoder_spec(config: Qwen3NextConfig) -> DecoderSpec:
        sparse = frozenset(
            layer
            for layer in range(config.num_hidden_layers)
            if layer not in config.mlp_only_layers
            and config.num_experts > 0
            and (layer + 1) % config.decoder_sparse_step == 0
        )
        return hybrid_spec(config, moe=shared_expert_spec(config, sparse, normalize=config.norm_topk_prob))

    def _hold_predict_layers(self, count: int) -> None:
        if count:
            self.mtp = PredictBlock(self.spec, count, self.backend)


def hybrid_spec(config: PreTrainedConfig, *, moe: MoeSpec | None) -> DecoderSpec:
    """The decoder of a config of Qwen3-Next or Qwen3.5."""
    return decoder_spec(
        config,
        attention_kinds=tuple(config.layer_types),
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        qk_norm=True,
        zero_centred_norms=True,
        gated_attention=True,
        delta_net=DeltaNetSpec(
            key_heads=config.linear_num_key_heads,
            value_heads=config.linear_num_value_heads,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
            conv_kernel=config.linear_conv_kernel_dim,
        ),
        moe=moe,
    )


def shared_expert_spec(config: PreTrainedConfig, layers: frozenset[int], *, normalize: bool) -> MoeSpec:
    """Routed experts and a gated shared one in `layers`."""
    return MoeSpec(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        width=config.moe_intermediate_size,
        normalize=normalize,
        layers=layers,
        shared_width=config.shared_expert_intermediate_size,
        shared_gate=True,
    )
