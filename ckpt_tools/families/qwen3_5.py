"""The text model of dense Qwen3.5 (`Qwen3_5ForCausalLM`, transformers 5): as Qwen3.5-MoE, without experts."""

from ckpt_tools.families import decoder, delta_net
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family, fp8_forms
from ckpt_tools.layouts.layout import Shape


def shape(config: Config) -> Shape:
    return delta_net.hybrid_shape(config, ("dense",) * decoder.number(config, "num_hidden_layers"))


FAMILY = Family(
    name="qwen3_5",
    title="Qwen3.5, text",
    model_types=("qwen3_5_text",),
    architecture="Qwen3_5ForCausalLM",
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *delta_net.norms(delta_net.LAYER, "decoder"),
        *delta_net.SPLIT_LINEAR_ATTENTION,
        *delta_net.gated_attention(delta_net.LAYER, "full_attention"),
        *delta_net.dense(delta_net.LAYER, "dense"),
        *delta_net.PREDICT_INPUTS,
        *delta_net.norms(delta_net.PREDICT, "predict"),
        *delta_net.gated_attention(delta_net.PREDICT, "predict"),
        *delta_net.dense(delta_net.PREDICT, "predict"),
    ),
    forms=fp8_forms(*delta_net.matrices("in_proj_qkv", "in_proj_z")),
    optional_layers={"predict": "mtp."},
)
