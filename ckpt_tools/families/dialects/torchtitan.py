"""torchtitan's native names, of release 0.3 and of 0.2, which other programs have from Meta's own checkpoints, too.

Experts are stacked projection by projection, `[experts, out, in]`; Llama's query and key rows are in Meta's order.
Source: `torchtitan/models/*/state_dict_adapter.py` and the modules beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ckpt_tools.families import decoder
from ckpt_tools.families.dialects.dialect import Dialect, Respell, interleaved, is_over_experts, only_leaf, respelled
from ckpt_tools.layouts.rules import Leaf, Node, PairedRope, Rule, Stack

HF = decoder.LAYER
TITAN = "layers.{layer}."
PREDICT = "mtp_layers.{predict}."

_DENSE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    HF + "input_layernorm.weight": TITAN + "attention_norm.weight",
    HF + "post_attention_layernorm.weight": TITAN + "ffn_norm.weight",
    HF + "self_attn.o_proj.weight": TITAN + "attention.wo.weight",
    HF + "mlp.gate_proj.weight": TITAN + "feed_forward.w1.weight",
    HF + "mlp.down_proj.weight": TITAN + "feed_forward.w2.weight",
    HF + "mlp.up_proj.weight": TITAN + "feed_forward.w3.weight",
}
_QKV = {HF + f"self_attn.{n}_proj.weight": TITAN + f"attention.qkv_linear.w{n}.weight" for n in "qkv"}
_QK_NORM = {HF + f"self_attn.{n}_norm.weight": TITAN + f"attention.{n}_norm.weight" for n in "qk"}
_EXPERTS = {
    HF + "mlp.gate.weight": TITAN + "moe.router.gate.weight",
    HF + "mlp.experts.{expert}.gate_proj.weight": TITAN + "moe.routed_experts.inner_experts.w1_EFD",
    HF + "mlp.experts.{expert}.down_proj.weight": TITAN + "moe.routed_experts.inner_experts.w2_EDF",
    HF + "mlp.experts.{expert}.up_proj.weight": TITAN + "moe.routed_experts.inner_experts.w3_EFD",
}
NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": {**_DENSE, **_QKV},
    "qwen3": {**_DENSE, **_QKV, **_QK_NORM},
    "qwen3_moe": {**_DENSE, **_QKV, **_QK_NORM, **_EXPERTS},
    "deepseek_v3": {
        **_DENSE,
        **_EXPERTS,
        HF + "self_attn.q_proj.weight": TITAN + "attention.wq.weight",
        HF + "self_attn.q_a_proj.weight": TITAN + "attention.wq_a.weight",
        HF + "self_attn.q_a_layernorm.weight": TITAN + "attention.q_norm.weight",
        HF + "self_attn.q_b_proj.weight": TITAN + "attention.wq_b.weight",
        HF + "self_attn.kv_a_proj_with_mqa.weight": TITAN + "attention.wkv_a.weight",
        HF + "self_attn.kv_a_layernorm.weight": TITAN + "attention.kv_norm.weight",
        HF + "self_attn.kv_b_proj.weight": TITAN + "attention.wkv_b.weight",
        HF + "mlp.gate.e_score_correction_bias": TITAN + "moe.expert_bias_E",
        HF + "mlp.shared_experts.gate_proj.weight": TITAN + "moe.shared_experts.w1.weight",
        HF + "mlp.shared_experts.down_proj.weight": TITAN + "moe.shared_experts.w2.weight",
        HF + "mlp.shared_experts.up_proj.weight": TITAN + "moe.shared_experts.w3.weight",
        HF + "enorm.weight": TITAN + "enorm.weight",
        HF + "hnorm.weight": TITAN + "hnorm.weight",
        HF + "eh_proj.weight": TITAN + "eh_proj.weight",
        HF + "shared_head.norm.weight": TITAN + "mtp_norm.weight",
    },
    "gpt_oss": {
        **_DENSE,
        **_QKV,
        **{HF + f"self_attn.{n}_proj.bias": TITAN + f"attention.qkv_linear.w{n}.bias" for n in "qkv"},
        HF + "self_attn.o_proj.bias": TITAN + "attention.wo.bias",
        HF + "self_attn.sinks": TITAN + "attention.sinks",
        HF + "mlp.router.weight": TITAN + "moe.router.gate.weight",
        HF + "mlp.router.bias": TITAN + "moe.router.gate.bias",
        HF + "mlp.experts.gate_up_proj": TITAN + "moe.routed_experts.inner_experts.mlp1_weight_EGD",
        HF + "mlp.experts.gate_up_proj_bias": TITAN + "moe.routed_experts.inner_experts.mlp1_bias_EG",
        HF + "mlp.experts.down_proj": TITAN + "moe.routed_experts.inner_experts.mlp2_weight_EDF",
        HF + "mlp.experts.down_proj_bias": TITAN + "moe.routed_experts.inner_experts.mlp2_bias_ED",
    },
}
"""By family: template of the leaf -> template of the stored name."""

_EARLIER = {
    "attention.qkv_linear.": "attention.",
    "routed_experts.inner_experts.": "experts.",
    "_EFD": "",
    "_EDF": "",
    "_EGD": "",
    "_EG": "",
    "_ED": "",
    "expert_bias_E": "expert_bias",
}
"""What 0.2 says instead, in this order; its head is `output.weight`."""

_BIAS = "a routing bias of torchtitan's load balancing, which the published model has no place for"
META_ORDER = {HF + "self_attn.q_proj.weight": "query_heads", HF + "self_attn.k_proj.weight": "kv_heads"}


def _respell(family: str, names: Mapping[str, str]) -> Respell:
    def stored(leaf: Leaf) -> Node:
        heads = META_ORDER.get(leaf.template) if family == "llama" else None
        return PairedRope(leaf, heads) if heads else leaf

    def respell(rule: Rule) -> Iterator[Rule]:
        if rule.stacked:
            yield respelled(rule, names[only_leaf(rule).template], interleaved(rule.value))
            return
        for leaf in rule.value.leaves():
            if leaf.template in names:
                value = Stack(leaf, "expert") if is_over_experts(rule) else stored(leaf)
                yield from _by_kind(respelled(rule, names[leaf.template], value))

    return respell


def _by_kind(rule: Rule) -> Iterator[Rule]:
    """A rule for each kind of layer of DeepSeek V3, because those that predict further tokens are counted apart."""
    kinds = ("dense", "moe", "predict") if rule.layers is None and TITAN in rule.native else (rule.layers,)
    for kind in kinds:
        native = rule.native.replace(TITAN, PREDICT) if kind == "predict" else rule.native
        yield replace(rule, native=native, layers=kind)


def _earlier(name: str) -> str:
    for now, before in _EARLIER.items():
        name = name.replace(now, before)
    return "output.weight" if name == "lm_head.weight" else name


def _dialect(name: str, title: str, names: Mapping[str, Mapping[str, str]], head: str, bias: str) -> Dialect:
    return Dialect(
        name=name,
        title=title,
        families={family: _respell(family, table) for family, table in names.items()},
        tied={head: "tok_embeddings.weight"},
        lent={
            HF + "embed_tokens.weight": "model.embed_tokens.weight",
            HF + "shared_head.head.weight": "lm_head.weight",
        },
        dropped={TITAN + bias: _BIAS},
        optional_layers={"predict": PREDICT},
    )


_BEFORE = {family: {leaf: _earlier(name) for leaf, name in table.items()} for family, table in NAMES.items()}
DIALECTS = (
    _dialect("torchtitan", "torchtitan 0.3", NAMES, "lm_head.weight", "moe.expert_bias_E"),
    _dialect("torchtitan-0.2", "torchtitan 0.2", _BEFORE, "output.weight", "moe.expert_bias"),
)
