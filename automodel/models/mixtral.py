"""Mixtral: experts in every layer, no q/k norm, one optional sliding window."""

from __future__ import annotations

from transformers import MixtralConfig

from automodel.models.causal_lm import NativeCausalLM
from automodel.models.spec import DecoderSpec, MoeSpec, decoder_spec, uniform_attention


class NeMoMixtralForCausalLM(NativeCausalLM):
    """Mixtral with a language-model head, computing what transformers' `MixtralForCausalLM` does.

    Routing weights stay in FP32, as in transformers 5; 4.57 rounds them to the model's dtype.
    """

    config_class = MixtralConfig
    transformers_architecture = "MixtralForCausalLM"

    @staticmethod
    def decoder_spec(config: MixtralConfig) -> DecoderSpec:
        return decoder_spec(
            config,
            attention_kinds=uniform_attention(config),
            moe=MoeSpec(
                num_experts=config.num_local_experts,
                top_k=config.num_experts_per_tok,
                width=config.intermediate_size,
                normalize=True,
                layers=frozenset(range(config.num_hidden_layers)),
                float32_weights=True,
                jitter=config.router_jitter_noise,
            ),
        )
