"""The text models of Qwen3.5, dense and with experts: Qwen3-Next's decoder. Only transformers 5 has their configs."""

from __future__ import annotations

from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig

from automodel.models.qwen3_next import NeMoQwen3NextForCausalLM, hybrid_spec, shared_expert_spec
from automodel.models.spec import DecoderSpec


class NeMoQwen35MoeForCausalLM(NeMoQwen3NextForCausalLM):
    """Qwen3.5-MoE's text model, computing what transformers' `Qwen3_5MoeForCausalLM` does."""

    config_class = Qwen3_5MoeTextConfig
    transformers_architecture = "Qwen3_5MoeForCausalLM"

    @staticmethod
    def decoder_spec(config: Qwen3_5MoeTextConfig) -> DecoderSpec:
        layers = frozenset(range(config.num_hidden_layers))
        return hybrid_spec(config, moe=shared_expert_spec(config, layers, normalize=True))


class NeMoQwen35ForCausalLM(NeMoQwen3NextForCausalLM):
    """Dense Qwen3.5's text model, computing what transformers' `Qwen3_5ForCausalLM` does."""

    config_class = Qwen3_5TextConfig
    transformers_architecture = "Qwen3_5ForCausalLM"

    @staticmethod
    def decoder_spec(config: Qwen3_5TextConfig) -> DecoderSpec:
        return hybrid_spec(config, moe=None)
