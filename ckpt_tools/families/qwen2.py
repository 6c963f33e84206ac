"""Qwen2 and Qwen2.5 dense (`Qwen2ForCausalLM`): biases on q, k and v, none on o."""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family, fp8_forms
from ckpt_tools.layouts.layout import Shape


def shape(config: Config) -> Shape:
    return decoder.decoder_shape(config, qkv_bias=True)


FAMILY = Family(
    name="qwen2",
    title="Qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        *decoder.FUSED_ATTENTION,
        *decoder.DENSE_MLP,
    ),
    forms=fp8_forms(*decoder.MATRICES),
)
