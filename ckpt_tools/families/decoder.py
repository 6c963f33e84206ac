"""The rules that decoder-only transformers share, and what their configs say. Families are composed of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_tools.core.errors import LayoutError
from ckpt_tools.layouts.layout import Shape
from ckpt_tools.layouts.rules import Concat, Grouped, Leaf, Rule, Stack, same

Config = Mapping[str, Any]
LAYER = "model.layers.{layer}."
ATTENTION = LAYER + "self_attn."

EMBEDDINGS = (
    same("model.embed_tokens.weight", "vocab", "hidden"),
    same("model.norm.weight", "hidden"),
    same("lm_head.weight", "vocab", "hidden", when="!tied"),
)
NORMS = (
    same(LAYER + "input_layernorm.weight", "hidden"),
    same(LAYER + "post_attention_layernorm.weight", "hidden"),
)
QK_NORM = (
    same(ATTENTION + "q_norm.weight", "head_dim"),
    same(ATTENTION + "k_norm.weight", "head_dim"),
)
ATTENTION_OUTPUT = (
    same(ATTENTION + "o_proj.weight", "hidden", "query"),
    same(ATTENTION + "o_proj.bias", "hidden", when="o_bias"),
)
FUSED_ATTENTION = (
    Rule(
        ATTENTION + "qkv_proj.weight",
        Grouped(
            Leaf(ATTENTION + "q_proj.weight", "query", "hidden"),
            Leaf(ATTENTION + "k_proj.weight", "key_value", "hidden"),
            Leaf(ATTENTION + "v_proj.weight", "key_value", "hidden"),
        ),
    ),
    Rule(
        ATTENTION + "qkv_proj.bias",
        Grouped(
            Leaf(ATTENTION + "q_proj.bias", "query"),
            Leaf(ATTENTION + "k_proj.bias", "key_value"),
            Leaf(ATTENTION + "v_proj.bias", "key_value"),
        ),
        when="qkv_bias",
    ),
    *ATTENTION_OUTPUT,
)
SEPARATE_ATTENTION = (
    same(ATTENTION + "q_proj.weight", "query", "hidden"),
    same(ATTENTION + "k_proj.weight", "key_value", "hidden"),
    same(ATTENTION + "v_proj.weight", "key_value", "hidden"),
    same(ATTENTION + "q_proj.bias", "query", when="qkv_bias"),
    same(ATTENTION + "k_proj.bias", "key_value", when="qkv_bias"),
    same(ATTENTION + "v_proj.bias", "key_value", when="qkv_bias"),
    *ATTENTION_OUTPUT,
)
"""As transformers holds it, for families without a native model."""
WIDE_QK_NORM = (
    same(ATTENTION + "q_norm.weight", "query"),
    same(ATTENTION + "k_norm.weight", "key_value"),
)
"""Norms over all heads together."""
DENSE_MLP = (
    Rule(
        LAYER + "mlp.gate_up_proj.weight",
        Concat(
            Leaf(LAYER + "mlp.gate_proj.weight", "mlp_width", "hidden"),
            Leaf(LAYER + "mlp.up_proj.weight", "mlp_width", "hidden"),
        ),
        layers="dense",
    ),
    Rule(
        LAYER + "mlp.gate_up_proj.bias",
        Concat(Leaf(LAYER + "mlp.gate_proj.bias", "mlp_width"), Leaf(LAYER + "mlp.up_proj.bias", "mlp_width")),
        when="mlp_bias",
        layers="dense",
    ),
    same(LAYER + "mlp.down_proj.weight", "hidden", "mlp_width", layers="dense"),
    same(LAYER + "mlp.down_proj.bias", "hidden", when="mlp_bias", layers="dense"),
)
PREDICT = (
    same(LAYER + "embed_tokens.weight", "vocab", "hidden", layers="predict"),
    same(LAYER + "enorm.weight", "hidden", layers="predict"),
    same(LAYER + "hnorm.weight", "hidden", layers="predict"),
    same(LAYER + "eh_proj.weight", "hidden", "twice_hidden", layers="predict"),
    same(LAYER + "shared_head.norm.weight", "hidden", layers="predict"),
    same(LAYER + "shared_head.head.weight", "vocab", "hidden", layers="predict"),
)
"""What layers for multi-token prediction have beside an ordinary layer."""


def separate_mlp(module: str, width: str, *, when: str | None = None, layers: str | None = None) -> tuple[Rule, ...]:
    """Gate, up and down projections of an MLP as transformers holds them, `module` being the template of its name."""
    return (
        same(module + "gate_proj.weight", width, "hidden", when=when, layers=layers),
        same(module + "up_proj.weight", width, "hidden", when=when, layers=layers),
        same(module + "down_proj.weight", "hidden", width, when=when, layers=layers),
    )


MATRICES = (
    *(ATTENTION + f"{name}_proj.weight" for name in "qkvo"),
    *(LAYER + f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)
"""What releases in FP8 encode; embeddings, norms and heads stay as they are."""


def moe_mlp(router: str, gate: str, up: str, down: str, layers: str = "moe") -> tuple[Rule, ...]:
    """Router and stacked experts of layers of one kind, given the templates of the leaves.

    Native experts are `[E, 2F, D]` (gate rows, then up rows) and `[E, D, F]`, so that stacking only copies.
    """
    return (
        Rule(LAYER + "mlp.gate.weight", Leaf(router, "experts", "hidden"), layers=layers),
        Rule(
            LAYER + "mlp.experts.gate_up_proj",
            Stack(Concat(Leaf(gate, "expert_width", "hidden"), Leaf(up, "expert_width", "hidden")), "expert"),
            layers=layers,
        ),
        Rule(
            LAYER + "mlp.experts.down_proj",
            Stack(Leaf(down, "hidden", "expert_width"), "expert"),
            layers=layers,
        ),
    )


DROPPED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
"""Buffers that repositories of 2023 carry; transformers recomputes them from the config."""


def decoder_shape(config: Config, *, tied_default: bool = False, **flags: bool) -> Shape:
    """The shape of a dense decoder; `flags` are set where true.

    Raises:
        LayoutError: the config lacks a field, or heads do not divide.
    """
    hidden, heads = number(config, "hidden_size"), number(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // max(heads, 1)
    if not heads or heads % kv_heads:
        raise LayoutError(f"config.json: {heads} attention heads do not divide over {kv_heads} key/value heads")
    flags["tied"] = bool(config.get("tie_word_embeddings", tied_default))
    return Shape(
        sizes={
            "vocab": number(config, "vocab_size"),
            "hidden": hidden,
            "query_heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "query": heads * head_dim,
            "key_value": kv_heads * head_dim,
            "mlp_width": number(config, "intermediate_size"),
        },
        layers=("dense",) * number(config, "num_hidden_layers"),
        flags=frozenset(name for name, on in flags.items() if on),
    )


def with_experts(shape: Shape, *, experts: int, width: int, layers: tuple[str, ...]) -> Shape:
    """A decoder's shape with experts in the layers whose kind is `moe`."""
    sizes = {**shape.sizes, "experts": experts, "expert_width": width}
    return Shape(sizes, layers, experts, shape.flags)


def number(config: Config, *names: str) -> int:
    """The first of the fields that the config has.

    Raises:
        LayoutError: it has none, or the value is not a positive whole number.
    """
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise LayoutError(f"config.json: {name} is {value!r}, not a whole number")
            return value
    raise LayoutError(f"config.json has no {' or '.join(names)}")
