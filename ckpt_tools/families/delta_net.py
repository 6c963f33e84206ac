"""What Qwen3-Next and Qwen3.5 share: layers of gated DeltaNet and of gated attention in turn, a shared expert with its
own gate, and a block for multi-token prediction (`mtp.*`) that transformers leaves out and engines use.

Native projections are grouped by key head (DeltaNet) and by KV head (attention), so that `Shard(0)` keeps groups whole.
"""

from __future__ import annotations

from ckpt_tools.core.errors import LayoutError
from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.layouts.layout import Shape
from ckpt_tools.layouts.rules import Concat, Flatten, Grouped, Leaf, Node, Rule, Slice, Stack, Unflatten, same

LAYER = decoder.LAYER
PREDICT = "mtp.layers.{nth}."
LINEAR = LAYER + "linear_attn."

PREDICT_INPUTS = (
    same("mtp.fc.weight", "hidden", "twice_hidden", when="predict"),
    same("mtp.pre_fc_norm_embedding.weight", "hidden", when="predict"),
    same("mtp.pre_fc_norm_hidden.weight", "hidden", when="predict"),
    same("mtp.norm.weight", "hidden", when="predict"),
)


def hybrid_shape(config: Config, mlps: tuple[str, ...]) -> Shape:
    """The shape of a decoder whose layers are of the kinds `decoder+<mixer>+<mlp>`, then `predict` ones.

    Args:
        config: of the text model. `layer_types` names the mixers; without it every `full_attention_interval`-th (4)
            layer is `full_attention`, and the others `linear_attention`.
        mlps: `moe` or `dense` for each layer.
    """
    number = decoder.number
    bias = bool(config.get("attention_bias", False))
    # Families whose layers all have experts have no such field.
    dense = decoder.decoder_shape({"intermediate_size": 0, **config}, qkv_bias=bias, o_bias=bias)
    interval = config.get("full_attention_interval") or 4
    mixers = config.get("layer_types") or [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(mlps))
    ]
    if len(mixers) != len(mlps):
        raise LayoutError(f"config.json: layer_types names {len(mixers)} layers, num_hidden_layers is {len(mlps)}")
    key_heads, value_heads = number(config, "linear_num_key_heads"), number(config, "linear_num_value_heads")
    if not key_heads or value_heads % key_heads:
        raise LayoutError(f"config.json: {value_heads} value heads do not divide over {key_heads} key heads")
    key_width = key_heads * number(config, "linear_key_head_dim")
    value_dim = number(config, "linear_value_head_dim")
    # Configs of Qwen3-Next do not count the block that the published repositories have.
    counted = (config.get(name) for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers"))
    predict = next((count for count in counted if count is not None), 1)
    return Shape(
        sizes={
            **dense.sizes,
            "twice_hidden": 2 * dense.sizes["hidden"],
            "query_and_gate": 2 * dense.sizes["query"],
            "key_heads": key_heads,
            "value_heads": value_heads,
            "twice_value_heads": 2 * value_heads,
            "value_heads_per_key_head": value_heads // key_heads,
            "linear_key_dim": key_width // key_heads,
            "linear_value_dim": value_dim,
            "key_width": key_width,
            "twice_key_width": 2 * key_width,
            "value_width": value_heads * value_dim,
            "value_width_per_key_head": value_heads * value_dim // key_heads,
            "conv_width": 2 * key_width + value_heads * value_dim,
            "qkvz_width": 2 * key_width + 2 * value_heads * value_dim,
            "conv_kernel": number(config, "linear_conv_kernel_dim"),
            "one": 1,
        },
        layers=tuple(f"decoder+{mixer}+{mlp}" for mixer, mlp in zip(mixers, mlps, strict=True))
        + ("predict",) * predict,
        flags=dense.flags | ({"predict"} if predict else set()),
    )


def with_experts(shape: Shape, config: Config) -> Shape:
    """The shape with the sizes of routed and shared experts."""
    number = decoder.number
    experts = number(config, "num_experts", "num_local_experts")
    sizes = {
        **shape.sizes,
        "experts": experts,
        "expert_width": number(config, "moe_intermediate_size"),
        "shared_width": number(config, "shared_expert_intermediate_size"),
    }
    return Shape(sizes, shape.layers, experts, shape.flags)


def norms(prefix: str, layers: str) -> tuple[Rule, ...]:
    return (
        same(prefix + "input_layernorm.weight", "hidden", layers=layers),
        same(prefix + "post_attention_layernorm.weight", "hidden", layers=layers),
    )


def gated_attention(prefix: str, layers: str) -> tuple[Rule, ...]:
    """Attention whose `q_proj` holds for each head its query and then the gate of its output."""
    attention = prefix + "self_attn."

    def fused(kind: str, *columns: str) -> Node:
        return Grouped(
            Leaf(f"{attention}q_proj.{kind}", "query_and_gate", *columns),
            Leaf(f"{attention}k_proj.{kind}", "key_value", *columns),
            Leaf(f"{attention}v_proj.{kind}", "key_value", *columns),
            gated=True,
        )

    return (
        Rule(attention + "qkv_proj.weight", fused("weight", "hidden"), layers=layers),
        Rule(attention + "qkv_proj.bias", fused("bias"), when="qkv_bias", layers=layers),
        same(attention + "q_norm.weight", "head_dim", layers=layers),
        same(attention + "k_norm.weight", "head_dim", layers=layers),
        same(attention + "o_proj.weight", "hidden", "query", layers=layers),
        same(attention + "o_proj.bias", "hidden", when="o_bias", layers=layers),
    )


def _linear_attention(*inputs: Rule) -> tuple[Rule, ...]:
    kind = "linear_attention"
    return (
        *inputs,
        same(LINEAR + "conv1d.weight", "conv_width", "one", "conv_kernel", layers=kind),
        Rule(LINEAR + "decay.A_log", Leaf(LINEAR + "A_log", "value_heads", keep_dtype=True), layers=kind),
        Rule(LINEAR + "decay.dt_bias", Leaf(LINEAR + "dt_bias", "value_heads", keep_dtype=True), layers=kind),
        same(LINEAR + "norm.weight", "linear_value_dim", layers=kind),
        same(LINEAR + "out_proj.weight", "hidden", "value_width", layers=kind),
    )


FUSED_LINEAR_ATTENTION = _linear_attention(
    same(LINEAR + "in_proj_qkvz.weight", "qkvz_width", "hidden", layers="linear_attention"),
    same(LINEAR + "in_proj_ba.weight", "twice_value_heads", "hidden", layers="linear_attention"),
)
"""Qwen3-Next: projections are published grouped by key head, as the native model has them."""


def _by_key_head(*parts: tuple[Node, str]) -> Node:
    """Rows of several leaves together for each key head, given how many of each leaf belong to one."""
    return Flatten(Concat(*(Unflatten(part, 0, ("key_heads", rows)) for part, rows in parts), dim=1), 0)


_QKV = Leaf(LINEAR + "in_proj_qkv.weight", "conv_width", "hidden")
SPLIT_LINEAR_ATTENTION = _linear_attention(
    Rule(
        LINEAR + "in_proj_qkvz.weight",
        _by_key_head(
            (Slice(_QKV, 0, "key_width"), "linear_key_dim"),
            (Slice(_QKV, "key_width", "key_width"), "linear_key_dim"),
            (Slice(_QKV, "twice_key_width", "value_width"), "value_width_per_key_head"),
            (Leaf(LINEAR + "in_proj_z.weight", "value_width", "hidden"), "value_width_per_key_head"),
        ),
        layers="linear_attention",
    ),
    Rule(
        LINEAR + "in_proj_ba.weight",
        _by_key_head(
            (Leaf(LINEAR + "in_proj_b.weight", "value_heads", "hidden"), "value_heads_per_key_head"),
            (Leaf(LINEAR + "in_proj_a.weight", "value_heads", "hidden"), "value_heads_per_key_head"),
        ),
        layers="linear_attention",
    ),
)
"""Qwen3.5: the queries, keys and values of all heads one after the other, and a leaf for each of z, b and a."""


def _gate_up(part: str, width: str) -> Node:
    return Concat(Leaf(part + "gate_proj.weight", width, "hidden"), Leaf(part + "up_proj.weight", width, "hidden"))


def moe(prefix: str, layers: str) -> tuple[Rule, ...]:
    """Router, stacked experts `[E, 2F, D]` and `[E, D, F]`, and the shared expert with its gate."""
    mlp, expert = prefix + "mlp.", prefix + "mlp.experts.{expert}."
    down = Leaf(expert + "down_proj.weight", "hidden", "expert_width")
    shared_down = Leaf(mlp + "shared_expert.down_proj.weight", "hidden", "shared_width")
    shared = mlp + "shared_experts."
    return (
        same(mlp + "gate.weight", "experts", "hidden", layers=layers),
        Rule(mlp + "experts.gate_up_proj", Stack(_gate_up(expert, "expert_width"), "expert"), layers=layers),
        Rule(mlp + "experts.down_proj", Stack(down, "expert"), layers=layers),
        Rule(shared + "gate_up_proj.weight", _gate_up(mlp + "shared_expert.", "shared_width"), layers=layers),
        Rule(shared + "down_proj.weight", shared_down, layers=layers),
        same(mlp + "shared_expert_gate.weight", "one", "hidden", layers=layers),
    )


def dense(prefix: str, layers: str) -> tuple[Rule, ...]:
    mlp = prefix + "mlp."
    return (
        Rule(mlp + "gate_up_proj.weight", _gate_up(mlp, "mlp_width"), layers=layers),
        same(mlp + "down_proj.weight", "hidden", "mlp_width", layers=layers),
    )


def matrices(*linear: str) -> tuple[str, ...]:
    """Leaves that the FP8 releases encode; `linear` names those of DeltaNet layers.

    Routers, gates of shared experts, norms, convolutions, the small projections of DeltaNet (which do not fill a block)
    and `mtp.fc` are plain there.
    """
    blocks = (LAYER, PREDICT)
    mlps = ("mlp.", "mlp.experts.{expert}.", "mlp.shared_expert.")
    return (
        *(f"{block}self_attn.{name}_proj.weight" for block in blocks for name in "qkvo"),
        *(f"{LINEAR}{name}.weight" for name in (*linear, "out_proj")),
        *(f"{block}{mlp}{name}_proj.weight" for block in blocks for mlp in mlps for name in ("gate", "up", "down")),
    )
