"""MiniMax-M2 (`MiniMaxM2ForCausalLM`): experts in every layer, q/k norms over all heads together, and routing with an
FP32 correction bias. Published in FP8; `w1`, `w3`, `w2` are gate, up and down.
"""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import FP8_BLOCKS, Family, Form
from ckpt_tools.layouts.layout import Shape
from ckpt_tools.layouts.rules import Leaf, Rule

MOE = decoder.LAYER + "block_sparse_moe."
EXPERT = MOE + "experts.{expert}."


def shape(config: Config) -> Shape:
    dense = decoder.decoder_shape(config)
    return decoder.with_experts(
        dense,
        experts=decoder.number(config, "num_local_experts", "num_experts"),
        width=decoder.number(config, "intermediate_size"),
        layers=("moe",) * len(dense.layers),
    )


MATRICES = (
    *(decoder.ATTENTION + f"{name}_proj.weight" for name in "qkvo"),
    *(EXPERT + f"{name}.weight" for name in ("w1", "w2", "w3")),
)

FAMILY = Family(
    name="minimax_m2",
    title="MiniMax-M2",
    model_types=("minimax_m2",),
    architecture="MiniMaxM2ForCausalLM",
    data_only=True,
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        *decoder.SEPARATE_ATTENTION,
        *decoder.WIDE_QK_NORM,
        *decoder.moe_mlp(
            router=MOE + "gate.weight",
            gate=EXPERT + "w1.weight",
            up=EXPERT + "w3.weight",
            down=EXPERT + "w2.weight",
        ),
        Rule(
            decoder.LAYER + "mlp.e_score_correction_bias",
            Leaf(MOE + "e_score_correction_bias", "experts", keep_dtype=True),
        ),
    ),
    forms=(
        Form(
            name="fp8",
            encoding="fp8",
            encoded=MATRICES,
            quantization_config={
                **FP8_BLOCKS,
                "fmt": "float8_e4m3fn",
                "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            },
        ),
    ),
)
