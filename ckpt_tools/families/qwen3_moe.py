"""Qwen3-MoE (`Qwen3MoeForCausalLM`): q/k norm, experts in every layer that is not dense by config."""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family, fp8_forms
from ckpt_tools.layouts.layout import Shape

EXPERT = "model.layers.{layer}.mlp.experts.{expert}."


def shape(config: Config) -> Shape:
    """A layer is dense when `mlp_only_layers` names it or `decoder_sparse_step` passes over it."""
    bias = bool(config.get("attention_bias", False))
    dense = decoder.decoder_shape(config, qkv_bias=bias, o_bias=bias)
    experts = decoder.number(config, "num_experts", "num_local_experts")
    step = config.get("decoder_sparse_step") or 1
    only_dense = set(config.get("mlp_only_layers") or ())
    layers = tuple(
        "moe" if experts and i not in only_dense and (i + 1) % step == 0 else "dense" for i in range(len(dense.layers))
    )
    width = decoder.number(config, "moe_intermediate_size")
    return decoder.with_experts(dense, experts=experts, width=width, layers=layers)


FAMILY = Family(
    name="qwen3_moe",
    title="Qwen3-MoE",
    model_types=("qwen3_moe",),
    architecture="Qwen3MoeForCausalLM",
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        *decoder.FUSED_ATTENTION,
        *decoder.QK_NORM,
        *decoder.DENSE_MLP,
        *decoder.moe_mlp(
            router="model.layers.{layer}.mlp.gate.weight",
            gate=EXPERT + "gate_proj.weight",
            up=EXPERT + "up_proj.weight",
            down=EXPERT + "down_proj.weight",
        ),
    ),
    forms=fp8_forms(*decoder.MATRICES, *(EXPERT + f"{name}_proj.weight" for name in ("gate", "up", "down"))),
)
