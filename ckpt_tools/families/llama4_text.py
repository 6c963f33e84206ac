"""Llama 4's text model (`Llama4ForCausalLM`): dense layers between those with experts, a shared expert beside them.

Experts are stacked on disk as they are in memory, `[experts, in, out]` with gate before up, so every name is the same
on both sides. The published multimodal repositories (`llama4`) hold vision towers too and keep their names.
"""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family
from ckpt_tools.layouts.layout import Shape
from ckpt_tools.layouts.rules import Leaf, Rule, same

MLP = decoder.LAYER + "feed_forward."
EXPERTS = MLP + "experts."


def shape(config: Config) -> Shape:
    """A layer has experts where `moe_layers` names it, else each last of `interleave_moe_layer_step` layers has."""
    number = decoder.number
    bias = bool(config.get("attention_bias"))
    dense = decoder.decoder_shape(config, qkv_bias=bias, o_bias=bias)
    step = config.get("interleave_moe_layer_step") or 1
    named = config.get("moe_layers")
    with_experts = set(range(step - 1, len(dense.layers), step) if named is None else named)
    layers = tuple("moe" if index in with_experts else "dense" for index in range(len(dense.layers)))
    width = number(config, "intermediate_size")
    found = decoder.with_experts(dense, experts=number(config, "num_local_experts"), width=width, layers=layers)
    sizes = {"mlp_width": number(config, "intermediate_size_mlp"), "twice_width": 2 * width}
    return Shape({**found.sizes, **sizes}, found.layers, found.experts, found.flags)


def _stacked(name: str, *sizes: str) -> Rule:
    return Rule(EXPERTS + name, Leaf(EXPERTS + name, *sizes), layers="moe", stacked=True)


FAMILY = Family(
    name="llama4_text",
    title="Llama 4 (text)",
    model_types=("llama4_text",),
    architecture="Llama4ForCausalLM",
    data_only=True,
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        *decoder.SEPARATE_ATTENTION,
        *decoder.separate_mlp(MLP, "mlp_width", layers="dense"),
        same(MLP + "router.weight", "experts", "hidden", layers="moe"),
        _stacked("gate_up_proj", "experts", "hidden", "twice_width"),
        _stacked("down_proj", "experts", "expert_width", "hidden"),
        *decoder.separate_mlp(MLP + "shared_expert.", "expert_width", layers="moe"),
    ),
)
