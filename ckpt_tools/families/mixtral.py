"""Mixtral (`MixtralForCausalLM`): experts in every layer, `w1`, `w3`, `w2` are gate, up and down."""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family, fp8_forms
from ckpt_tools.layouts.layout import Shape

MOE = "model.layers.{layer}.block_sparse_moe."


def shape(config: Config) -> Shape:
    dense = decoder.decoder_shape(config)
    return decoder.with_experts(
        dense,
        experts=decoder.number(config, "num_local_experts", "num_experts"),
        width=decoder.number(config, "intermediate_size"),
        layers=("moe",) * len(dense.layers),
    )


FAMILY = Family(
    name="mixtral",
    title="Mixtral",
    model_types=("mixtral",),
    architecture="MixtralForCausalLM",
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        *decoder.FUSED_ATTENTION,
        *decoder.moe_mlp(
            router=MOE + "gate.weight",
            gate=MOE + "experts.{expert}.w1.weight",
            up=MOE + "experts.{expert}.w3.weight",
            down=MOE + "experts.{expert}.w2.weight",
        ),
    ),
    forms=fp8_forms(*decoder.MATRICES, *(MOE + f"experts.{{expert}}.{name}.weight" for name in ("w1", "w2", "w3"))),
)
