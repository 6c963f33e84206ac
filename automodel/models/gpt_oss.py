"""GPT-OSS: attention sinks, sliding and full layers in turn, biased experts with a clamped SwiGLU."""

from __future__ import annotations

from transformers import GptOssConfig

from automodel.kernels.activations import ClampedSwiGLU
from automodel.models.causal_lm import NativeCausalLM
from automodel.models.spec import DecoderSpec, MoeSpec, decoder_spec


class NeMoGptOssForCausalLM(NativeCausalLM):
    """GPT-OSS with a language-model head, computing what transformers' `GptOssForCausalLM` does.

    Two deviations, where transformers' class falls short: packed documents (positions that restart) see only
    themselves, and router logits are the logits, as in 5.x; 4.57 returns the routing weights under that name and
    computes the auxiliary loss from them.
    """

    config_class = GptOssConfig
    transformers_architecture = "GptOssForCausalLM"

    @staticmethod
    def decoder_spec(config: GptOssConfig) -> DecoderSpec:
        return decoder_spec(
            config,
            attention_kinds=tuple(config.layer_types),
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            sinks=True,
            norm_rounds_last=True,
            moe=MoeSpec(
                num_experts=config.num_local_experts,
                top_k=config.num_experts_per_tok,
                width=config.intermediate_size,
                normalize=False,
                layers=frozenset(range(config.num_hidden_layers)),
                # 4.57 has these as constants, not as fields of the config.
                activation=ClampedSwiGLU(getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)),
                bias=True,
                router_bias=True,
                softmax_over_chosen=True,
            ),
        )
