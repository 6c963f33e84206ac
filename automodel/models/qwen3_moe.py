"""Qwen3-MoE: q/k norm, experts in every layer except those the config exempts."""

from __future__ import annotations

from transformers import Qwen3MoeConfig

from automodel.models.causal_lm import NativeCausalLM
from automodel.models.spec import DecoderSpec, MoeSpec, decoder_spec, uniform_attention


class NeMoQwen3MoeForCausalLM(NativeCausalLM):
    """Qwen3-MoE with a language-model head, computing what transformers' `Qwen3MoeForCausalLM` does."""

    config_class = Qwen3MoeConfig
    transformers_architecture = "Qwen3MoeForCausalLM"

    @staticmethod
    def decoder_spec(config: Qwen3MoeConfig) -> DecoderSpec:
        sparse = frozenset(
            layer
            for layer in range(config.num_hidden_layers)
            if layer not in config.mlp_only_layers
            and config.num_experts > 0
            and (layer + 1) % config.decoder_sparse_step == 0
        )
        return decoder_spec(
            config,
            attention_kinds=uniform_attention(config),
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm=True,
            moe=MoeSpec(
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                width=config.moe_intermediate_size,
                normalize=config.norm_topk_prob,
                layers=sparse,
            ),
        )
