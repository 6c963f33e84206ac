"""Qwen2 dense: biases on queries, keys and values; full or sliding attention per layer."""

from __future__ import annotations

from transformers import Qwen2Config

from automodel.models.causal_lm import NativeCausalLM
from automodel.models.spec import DecoderSpec, decoder_spec


class NeMoQwen2ForCausalLM(NativeCausalLM):
    """Qwen2 with a language-model head, computing what transformers' `Qwen2ForCausalLM` does."""

    config_class = Qwen2Config
    transformers_architecture = "Qwen2ForCausalLM"

    @staticmethod
    def decoder_spec(config: Qwen2Config) -> DecoderSpec:
        return decoder_spec(config, attention_kinds=tuple(config.layer_types), qkv_bias=True)
