"""Gemma 3's text model (`Gemma3ForCausalLM`): dense, four norms a layer, q/k norms.

Every name is the same on both sides. The published multimodal repositories (`gemma3`) hold a vision tower too and keep
their names.
"""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family
from ckpt_tools.layouts.layout import Shape
from ckpt_tools.layouts.rules import same


def shape(config: Config) -> Shape:
    bias = bool(config.get("attention_bias"))
    return decoder.decoder_shape(config, tied_default=True, qkv_bias=bias, o_bias=bias)


FAMILY = Family(
    name="gemma3_text",
    title="Gemma 3 (text)",
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    data_only=True,
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        same(decoder.LAYER + "pre_feedforward_layernorm.weight", "hidden"),
        same(decoder.LAYER + "post_feedforward_layernorm.weight", "hidden"),
        *decoder.SEPARATE_ATTENTION,
        *decoder.QK_NORM,
        *decoder.separate_mlp(decoder.LAYER + "mlp.", "mlp_width"),
    ),
)
