"""The text model of Qwen3.5-MoE (`Qwen3_5MoeForCausalLM`, transformers 5): Qwen3-Next with projections apart.

Published repositories are multimodal (`model_type` `qwen3_5_moe`). They are no repositories of this family: their
tensors, `model.visual.*` too, keep their names.
"""

from ckpt_tools.families import decoder, delta_net
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family, fp8_forms
from ckpt_tools.layouts.layout import Shape


def shape(config: Config) -> Shape:
    mlps = ("moe",) * decoder.number(config, "num_hidden_layers")
    return delta_net.with_experts(delta_net.hybrid_shape(config, mlps), config)


FAMILY = Family(
    name="qwen3_5_moe",
    title="Qwen3.5-MoE, text",
    model_types=("qwen3_5_moe_text",),
    architecture="Qwen3_5MoeForCausalLM",
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *delta_net.norms(delta_net.LAYER, "decoder"),
        *delta_net.SPLIT_LINEAR_ATTENTION,
        *delta_net.gated_attention(delta_net.LAYER, "full_attention"),
        *delta_net.moe(delta_net.LAYER, "moe"),
        *delta_net.PREDICT_INPUTS,
        *delta_net.norms(delta_net.PREDICT, "predict"),
        *delta_net.gated_attention(delta_net.PREDICT, "predict"),
        *delta_net.moe(delta_net.PREDICT, "predict"),
    ),
    forms=fp8_forms(*delta_net.matrices("in_proj_qkv", "in_proj_z")),
    optional_layers={"predict": "mtp."},
)
