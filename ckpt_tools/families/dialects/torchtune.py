"""torchtune's names (0.6.1, its last release) of Llama and Qwen2; Llama's query and key rows are in Meta's order.

Source: `torchtune/models/convert_weights.py` and `torchtune/models/qwen2/_convert_weights.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt_tools.families import decoder
from ckpt_tools.families.dialects.dialect import Dialect, Respell, respelled
from ckpt_tools.families.dialects.torchtitan import META_ORDER
from ckpt_tools.layouts.rules import PairedRope, Rule

HF = decoder.LAYER
TUNE = "layers.{layer}."

_DENSE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "output.weight",
    HF + "input_layernorm.weight": TUNE + "sa_norm.scale",
    HF + "post_attention_layernorm.weight": TUNE + "mlp_norm.scale",
    HF + "self_attn.o_proj.weight": TUNE + "attn.output_proj.weight",
    HF + "mlp.gate_proj.weight": TUNE + "mlp.w1.weight",
    HF + "mlp.down_proj.weight": TUNE + "mlp.w2.weight",
    HF + "mlp.up_proj.weight": TUNE + "mlp.w3.weight",
    **{HF + f"self_attn.{n}_proj.weight": TUNE + f"attn.{n}_proj.weight" for n in "qkv"},
}
_QKV_BIAS = {HF + f"self_attn.{n}_proj.bias": TUNE + f"attn.{n}_proj.bias" for n in "qkv"}


def _respell(names: Mapping[str, str], heads: Mapping[str, str]) -> Respell:
    def respell(rule: Rule) -> Iterator[Rule]:
        for leaf in rule.value.leaves():
            if leaf.template in names:
                value = PairedRope(leaf, heads[leaf.template]) if leaf.template in heads else leaf
                yield respelled(rule, names[leaf.template], value)

    return respell


DIALECTS = (
    Dialect(
        name="torchtune",
        title="torchtune 0.6",
        families={"llama": _respell(_DENSE, META_ORDER), "qwen2": _respell({**_DENSE, **_QKV_BIAS}, {})},
        tied={"output.weight": "tok_embeddings.weight"},
    ),
)
