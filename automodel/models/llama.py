"""Llama dense: full attention; biases and rope scaling as the config says."""

from __future__ import annotations

from transformers import LlamaConfig

from automodel.models.causal_lm import NativeCausalLM
from automodel.models.spec import DecoderSpec, decoder_spec


class NeMoLlamaForCausalLM(NativeCausalLM):
    """Llama with a language-model head, computing what transformers' `LlamaForCausalLM` does."""

    config_class = LlamaConfig
    transformers_architecture = "LlamaForCausalLM"

    @staticmethod
    def decoder_spec(config: LlamaConfig) -> DecoderSpec:
        return decoder_spec(
            config,
            attention_kinds=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
        )
