"""OLMoE (`OlmoeForCausalLM`): experts in every layer, q/k norms over all heads together."""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family
from ckpt_tools.layouts.layout import Shape

EXPERT = decoder.LAYER + "mlp.experts.{expert}."


def shape(config: Config) -> Shape:
    bias = bool(config.get("attention_bias"))
    dense = decoder.decoder_shape(config, qkv_bias=bias, o_bias=bias)
    return decoder.with_experts(
        dense,
        experts=decoder.number(config, "num_experts", "num_local_experts"),
        width=decoder.number(config, "intermediate_size"),
        layers=("moe",) * len(dense.layers),
    )


FAMILY = Family(
    name="olmoe",
    title="OLMoE",
    model_types=("olmoe",),
    architecture="OlmoeForCausalLM",
    data_only=True,
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        *decoder.SEPARATE_ATTENTION,
        *decoder.WIDE_QK_NORM,
        *decoder.moe_mlp(
            router=decoder.LAYER + "mlp.gate.weight",
            gate=EXPERT + "gate_proj.weight",
            up=EXPERT + "up_proj.weight",
            down=EXPERT + "down_proj.weight",
        ),
    ),
)
