"""GPT-OSS (`GptOssForCausalLM`): biased experts with interleaved gate and up, attention sinks and biases.

Published as MXFP4 (`*_blocks`, `*_scales`: rows are outputs, as in the native layout) and, where transformers wrote it,
as BF16 with stacked `[experts, in, out]` tensors. Names tell the two apart; shapes cannot, `down_proj` is square.
"""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family, Form
from ckpt_tools.layouts.layout import Shape
from ckpt_tools.layouts.rules import Deinterleave, Leaf, Node, Rule, Transpose, same

LAYER = decoder.LAYER
EXPERTS = LAYER + "mlp.experts."


def shape(config: Config) -> Shape:
    bias = bool(config.get("attention_bias", True))
    dense = decoder.decoder_shape(config, qkv_bias=bias, o_bias=bias)
    experts = decoder.number(config, "num_local_experts", "num_experts")
    width = decoder.number(config, "intermediate_size")
    found = decoder.with_experts(dense, experts=experts, width=width, layers=("moe",) * len(dense.layers))
    return Shape({**found.sizes, "twice_width": 2 * width}, found.layers, found.experts, found.flags)


def _rules(gate_up: Node, down: Node) -> tuple[Rule, ...]:
    return (
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        *decoder.FUSED_ATTENTION,
        same(decoder.ATTENTION + "sinks", "query_heads"),
        Rule(LAYER + "mlp.gate.weight", Leaf(LAYER + "mlp.router.weight", "experts", "hidden")),
        Rule(LAYER + "mlp.gate.bias", Leaf(LAYER + "mlp.router.bias", "experts")),
        Rule(EXPERTS + "gate_up_proj", Deinterleave(gate_up, dim=1), stacked=True),
        Rule(EXPERTS + "down_proj", down, stacked=True),
        Rule(
            EXPERTS + "gate_up_proj_bias",
            Deinterleave(Leaf(EXPERTS + "gate_up_proj_bias", "experts", "twice_width"), dim=1),
            stacked=True,
        ),
        Rule(EXPERTS + "down_proj_bias", Leaf(EXPERTS + "down_proj_bias", "experts", "hidden"), stacked=True),
    )


FAMILY = Family(
    name="gpt_oss",
    title="GPT-OSS",
    model_types=("gpt_oss",),
    architecture="GptOssForCausalLM",
    shape=shape,
    rules=_rules(
        gate_up=Transpose(Leaf(EXPERTS + "gate_up_proj", "experts", "hidden", "twice_width")),
        down=Transpose(Leaf(EXPERTS + "down_proj", "experts", "expert_width", "hidden")),
    ),
    forms=(
        Form(
            name="mxfp4",
            encoding="mxfp4",
            encoded=(EXPERTS + "gate_up_proj", EXPERTS + "down_proj"),
            quantization_config={
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            rules=_rules(
                gate_up=Leaf(EXPERTS + "gate_up_proj", "experts", "twice_width", "hidden"),
                down=Leaf(EXPERTS + "down_proj", "experts", "hidden", "expert_width"),
            ),
        ),
    ),
)
