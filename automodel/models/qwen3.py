"""Qwen3 dense: q/k norm, full or sliding attention per layer."""

from __future__ import annotations

from transformers import Qwen3Config

from automodel.models.causal_lm import NativeCausalLM
from automodel.models.spec import DecoderSpec, decoder_spec


class NeMoQwen3ForCausalLM(NativeCausalLM):
    """Qwen3 with a language-model head, computing what transformers' `Qwen3ForCausalLM` does."""

    config_class = Qwen3Config
    transformers_architecture = "Qwen3ForCausalLM"

    @staticmethod
    def decoder_spec(config: Qwen3Config) -> DecoderSpec:
        return decoder_spec(
            config,
            attention_kinds=tuple(config.layer_types),
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm=True,
        )
