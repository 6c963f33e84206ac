"""Qwen3 dense (`Qwen3ForCausalLM`): q/k norm, optional attention biases."""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family, fp8_forms
from ckpt_tools.layouts.layout import Shape


def shape(config: Config) -> Shape:
    bias = bool(config.get("attention_bias", False))
    return decoder.decoder_shape(config, qkv_bias=bias, o_bias=bias)


FAMILY = Family(
    name="qwen3",
    title="Qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        *decoder.FUSED_ATTENTION,
        *decoder.QK_NORM,
        *decoder.DENSE_MLP,
    ),
    forms=fp8_forms(*decoder.MATRICES),
)
