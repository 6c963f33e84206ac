"""GLM-4.5, 4.6 and 4.7 (`Glm4MoeForCausalLM`): first dense layers, shared experts, routing with an FP32 correction
bias, q/k norms where the config says, and a layer for multi-token prediction.

transformers never loads that last layer, and repositories that it wrote have none: the names decide.
"""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family
from ckpt_tools.layouts.layout import Shape
from ckpt_tools.layouts.rules import Leaf, Rule, same

LAYER = decoder.LAYER
EXPERT = LAYER + "mlp.experts.{expert}."


def shape(config: Config) -> Shape:
    """Layers below `first_k_dense_replace` are dense; the last `num_nextn_predict_layers` predict further tokens."""
    number = decoder.number
    decoder_shape = decoder.decoder_shape(
        config, qkv_bias=bool(config.get("attention_bias")), qk_norm=bool(config.get("use_qk_norm"))
    )
    layers, dense = len(decoder_shape.layers), min(config.get("first_k_dense_replace", 1), len(decoder_shape.layers))
    kinds = ("dense",) * dense + ("moe",) * (layers - dense)
    width = number(config, "moe_intermediate_size")
    found = decoder.with_experts(
        decoder_shape,
        experts=number(config, "n_routed_experts", "num_local_experts"),
        width=width,
        layers=kinds + ("predict",) * (config.get("num_nextn_predict_layers") or 0),
    )
    sizes = {"shared_width": width * config.get("n_shared_experts", 1), "twice_hidden": 2 * found.sizes["hidden"]}
    return Shape({**found.sizes, **sizes}, found.layers, found.experts, found.flags)


def _moe(layers: str) -> tuple[Rule, ...]:
    correction = Leaf(LAYER + "mlp.gate.e_score_correction_bias", "experts", keep_dtype=True)
    return (
        *decoder.moe_mlp(
            router=LAYER + "mlp.gate.weight",
            gate=EXPERT + "gate_proj.weight",
            up=EXPERT + "up_proj.weight",
            down=EXPERT + "down_proj.weight",
            layers=layers,
        ),
        Rule(correction.template, correction, layers=layers),
        *decoder.separate_mlp(LAYER + "mlp.shared_experts.", "shared_width", layers=layers),
    )


FAMILY = Family(
    name="glm4_moe",
    title="GLM-4.5",
    model_types=("glm4_moe",),
    architecture="Glm4MoeForCausalLM",
    data_only=True,
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        *decoder.SEPARATE_ATTENTION,
        same(decoder.ATTENTION + "q_norm.weight", "head_dim", when="qk_norm"),
        same(decoder.ATTENTION + "k_norm.weight", "head_dim", when="qk_norm"),
        *decoder.separate_mlp(LAYER + "mlp.", "mlp_width", layers="dense"),
        *_moe("moe"),
        *_moe("predict"),
        *decoder.PREDICT,
    ),
    optional_layers={"predict": LAYER},
)
