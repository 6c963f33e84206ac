"""DeepSeek V3, R1 and what shares their code (Moonlight): latent attention, group-limited routing, shared experts."""

from __future__ import annotations

import math

from transformers import DeepseekV3Config

from automodel.compat import rope_parameters, rope_type
from automodel.models.causal_lm import NativeCausalLM
from automodel.models.spec import DecoderSpec, GroupSpec, LatentSpec, MoeSpec, decoder_spec
from ckpt_tools.core.errors import UsageError

_COMPUTED = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


class NeMoDeepseekV3ForCausalLM(NativeCausalLM):
    """DeepSeek V3 with a language-model head, computing what transformers' `DeepseekV3ForCausalLM` does.

    Layers for multi-token prediction are held where the checkpoint has them, and neither run nor trained.
    """

    config_class = DeepseekV3Config
    transformers_architecture = "DeepseekV3ForCausalLM"

    @staticmethod
    def decoder_spec(config: DeepseekV3Config) -> DecoderSpec:
        for field, value in _COMPUTED.items():
            if getattr(config, field, value) != value:
                raise UsageError(
                    f"DeepSeek V3 with {field}={getattr(config, field)!r} is not computed, only {value!r}",
                    hint="transformers' class ignores the field; pass the config with the value that the weights need",
                )
        layers, frequency = range(config.first_k_dense_replace, config.num_hidden_layers), _frequency(config)
        return decoder_spec(
            config,
            attention_kinds=("full_attention",) * config.num_hidden_layers,
            latent=LatentSpec(
                query_rank=config.q_lora_rank,
                rank=config.kv_lora_rank,
                nope_dim=config.qk_nope_head_dim,
                rope_dim=config.qk_rope_head_dim,
                value_dim=config.v_head_dim,
                interleaved=config.rope_interleave,
                bias=config.attention_bias,
                scale=_attention_scale(config),
            ),
            moe=MoeSpec(
                num_experts=config.n_routed_experts,
                top_k=config.num_experts_per_tok,
                width=config.moe_intermediate_size,
                normalize=config.norm_topk_prob,
                layers=frozenset(layer for layer in layers if layer % frequency == 0),
                groups=GroupSpec(config.n_group, config.topk_group, config.routed_scaling_factor),
                shared_width=config.moe_intermediate_size * (config.n_shared_experts or 0),
            ),
        )


def _frequency(config: DeepseekV3Config) -> int:
    return getattr(config, "moe_layer_freq", None) or 1


def _attention_scale(config: DeepseekV3Config) -> float:
    """1 / sqrt(size of a query head), times YaRN's temperature (arXiv 2309.00071, section 3.4) squared."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    parameters = rope_parameters(config)
    mscale, factor = parameters.get("mscale_all_dim") or 0, parameters.get("factor") or 1
    if rope_type(config) == "default" or not mscale or factor <= 1:
        return scale
    return scale * (0.1 * mscale * math.log(factor) + 1.0) ** 2
