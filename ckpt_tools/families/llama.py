"""Llama 2 and 3 (`LlamaForCausalLM`), and what shares its architecture (SmolLM2)."""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family, fp8_forms
from ckpt_tools.layouts.layout import Shape


def shape(config: Config) -> Shape:
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    return decoder.decoder_shape(config, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


FAMILY = Family(
    name="llama",
    title="Llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        *decoder.FUSED_ATTENTION,
        *decoder.DENSE_MLP,
    ),
    dropped=decoder.DROPPED,
    forms=fp8_forms(*decoder.MATRICES),
)
