"""Qwen3-Next (`Qwen3NextForCausalLM`): layers of gated DeltaNet and of gated attention in turn, all with experts."""

from ckpt_tools.families import decoder, delta_net
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family, fp8_forms
from ckpt_tools.layouts.layout import Shape


def shape(config: Config) -> Shape:
    """A layer is dense when `mlp_only_layers` names it or `decoder_sparse_step` passes over it."""
    step = config.get("decoder_sparse_step") or 1
    only_dense = set(config.get("mlp_only_layers") or ())
    mlps = tuple(
        "moe" if i not in only_dense and (i + 1) % step == 0 else "dense"
        for i in range(decoder.number(config, "num_hidden_layers"))
    )
    return delta_net.with_experts(delta_net.hybrid_shape(config, mlps), config)


FAMILY = Family(
    name="qwen3_next",
    title="Qwen3-Next",
    model_types=("qwen3_next",),
    architecture="Qwen3NextForCausalLM",
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *delta_net.norms(delta_net.LAYER, "decoder"),
        *delta_net.FUSED_LINEAR_ATTENTION,
        *delta_net.gated_attention(delta_net.LAYER, "full_attention"),
        *delta_net.moe(delta_net.LAYER, "moe"),
        *delta_net.dense(delta_net.LAYER, "dense"),
        *delta_net.PREDICT_INPUTS,
        *delta_net.norms(delta_net.PREDICT, "predict"),
        *delta_net.gated_attention(delta_net.PREDICT, "predict"),
        *delta_net.moe(delta_net.PREDICT, "predict"),
    ),
    forms=fp8_forms(*delta_net.matrices("in_proj_qkvz")),
    optional_layers={"predict": "mtp."},
)
