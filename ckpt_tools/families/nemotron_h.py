"""Nemotron-H (`NemotronHForCausalLM`): dense hybrids of Mamba-2, attention and squared-ReLU MLPs, and the hybrids with
experts of Nemotron 3 Nano and Super, whose experts may work in a narrower latent space.

One mixer a layer. The Hugging Face side says `backbone.`; layers for multi-token prediction (`mtp.`) are there in some
releases only, whatever the config counts: the names decide. Embeddings are not tied, whatever the config says, as in
transformers and vLLM.
"""

from ckpt_tools.core.errors import LayoutError
from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family
from ckpt_tools.layouts.layout import Shape
from ckpt_tools.layouts.rules import Grouped, Leaf, Rule, Stack, same

PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""Kinds of layer by their letter in `hybrid_override_pattern`."""
SPELLINGS = {"linear_attention": "mamba", "full_attention": "attention"}
"""Kinds of layer by their name in `layers_block_type` of transformers 5, where it differs."""
HEAD_DIM = 128
"""What transformers takes where a config has no `head_dim`."""


def shape(config: Config) -> Shape:
    """Sizes, flags, and the kind of each layer.

    Raises:
        LayoutError: a field is missing, or a layer is of no known kind.
    """
    number = decoder.number
    layers = kinds(config, "layers_block_type", "hybrid_override_pattern")
    heads = number(config, "num_attention_heads")
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or HEAD_DIM
    mamba_heads = number(config, "mamba_num_heads")
    inner = mamba_heads * number(config, "mamba_head_dim")
    convolved = inner + 2 * number(config, "mamba_n_groups", "n_groups") * number(config, "ssm_state_size")
    predict = _predict_kinds(config)
    experts = (
        number(config, "n_routed_experts", "num_local_experts")
        if any("moe" in kind for kind in (*layers, *predict))
        else 0
    )
    latent = config.get("moe_latent_size")
    conv_bias = config.get("mamba_conv_bias", config.get("use_conv_bias", True))
    flags = {
        "latent": latent is not None,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "projection_bias": bool(config.get("use_bias", False)),
        "conv_bias": bool(conv_bias),
    }
    hidden = number(config, "hidden_size")
    return Shape(
        sizes={
            "vocab": number(config, "vocab_size"),
            "hidden": hidden,
            "twice_hidden": 2 * hidden,
            "query_heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "query": heads * head_dim,
            "key_value": kv_heads * head_dim,
            "mamba_heads": mamba_heads,
            "inner": inner,
            "convolved": convolved,
            "conv_kernel": number(config, "mamba_d_conv", "conv_kernel"),
            "projected": inner + convolved + mamba_heads,
            "mlp_width": number(config, "intermediate_size") if "mlp" in layers else 0,
            "experts": experts,
            "expert_in": hidden if latent is None else latent,
            "expert_width": number(config, "moe_intermediate_size") if experts else 0,
            "shared_width": number(config, "moe_shared_expert_intermediate_size") if experts else 0,
        },
        layers=(*(f"decoder+{kind}" for kind in layers), *predict),
        experts=experts,
        flags=frozenset(name for name, on in flags.items() if on),
    )


def kinds(config: Config, listed: str, pattern: str) -> tuple[str, ...]:
    """The kind of each layer, from a list of names or else a string of letters.

    Raises:
        LayoutError: the config has neither field, or a kind is unknown.
    """
    field, spelled = (listed, SPELLINGS) if config.get(listed) is not None else (pattern, PATTERN)
    found = config.get(field)
    if found is None:
        raise LayoutError(f"config.json has no {listed} or {pattern}")
    names = [spelled.get(name, name) for name in found]
    if unknown := sorted(set(names) - set(PATTERN.values())):
        raise LayoutError(f"config.json: {field} has layers of no known kind: {', '.join(unknown)}")
    return tuple(names)


def _predict_kinds(config: Config) -> tuple[str, ...]:
    """Each prediction is a run of layers: inputs are merged before the first, and the last is followed by a norm."""
    count = config.get("num_nextn_predict_layers") or 0
    if not count:
        return ()
    one = kinds({"mtp_hybrid_override_pattern": "*E", **config}, "mtp_layers_block_type", "mtp_hybrid_override_pattern")
    if unknown := sorted(set(one) - {"attention", "moe"}):
        raise LayoutError(f"config.json: layers for multi-token prediction of kind {', '.join(unknown)} are unknown")
    properties = [["predict", f"predict_{kind}"] for kind in one]
    properties[0].append("predict_first")
    properties[-1].append("predict_last")
    return tuple("+".join(layer) for layer in properties) * count


def _attention(native: str, hf: str, layers: str) -> tuple[Rule, ...]:
    query, key, value = (
        Leaf(hf + f"mixer.{name}_proj.weight", size, "hidden")
        for name, size in (("q", "query"), ("k", "key_value"), ("v", "key_value"))
    )
    return (
        Rule(native + "mixer.qkv_proj.weight", Grouped(query, key, value), layers=layers),
        Rule(native + "mixer.o_proj.weight", Leaf(hf + "mixer.o_proj.weight", "hidden", "query"), layers=layers),
    )


def _moe(native: str, hf: str, layers: str) -> tuple[Rule, ...]:
    def renamed(name: str, *sizes: str, when: str | None = None, keep_dtype: bool = False) -> Rule:
        return Rule(native + name, Leaf(hf + name, *sizes, keep_dtype=keep_dtype), when=when, layers=layers)

    up = Leaf(hf + "mixer.experts.{expert}.up_proj.weight", "expert_width", "expert_in")
    down = Leaf(hf + "mixer.experts.{expert}.down_proj.weight", "expert_in", "expert_width")
    return (
        # FP32 in Nemotron 3 Nano, BF16 in Super.
        renamed("mixer.gate.weight", "experts", "hidden", keep_dtype=True),
        renamed("mixer.gate.e_score_correction_bias", "experts", keep_dtype=True),
        Rule(native + "mixer.experts.up_proj", Stack(up, "expert"), layers=layers),
        Rule(native + "mixer.experts.down_proj", Stack(down, "expert"), layers=layers),
        renamed("mixer.shared_experts.up_proj.weight", "shared_width", "hidden"),
        renamed("mixer.shared_experts.up_proj.bias", "shared_width", when="mlp_bias"),
        renamed("mixer.shared_experts.down_proj.weight", "hidden", "shared_width"),
        renamed("mixer.shared_experts.down_proj.bias", "hidden", when="mlp_bias"),
        renamed("mixer.fc1_latent_proj.weight", "expert_in", "hidden", when="latent"),
        renamed("mixer.fc1_latent_proj.bias", "expert_in", when="latent&mlp_bias"),
        renamed("mixer.fc2_latent_proj.weight", "hidden", "expert_in", when="latent"),
        renamed("mixer.fc2_latent_proj.bias", "hidden", when="latent&mlp_bias"),
    )


def _mamba(native: str, hf: str) -> tuple[Rule, ...]:
    def renamed(name: str, *sizes: str | int, when: str | None = None) -> Rule:
        return Rule(native + name, Leaf(hf + name, *sizes), when=when, layers="mamba")

    return (
        *(
            # A module of their own, because they are sharded and computed in FP32 whatever the others are.
            Rule(f"{native}mixer.ssm.{name}", Leaf(f"{hf}mixer.{name}", "mamba_heads", keep_dtype=True), layers="mamba")
            for name in ("A_log", "D", "dt_bias")
        ),
        renamed("mixer.in_proj.weight", "projected", "hidden"),
        renamed("mixer.in_proj.bias", "projected", when="projection_bias"),
        renamed("mixer.conv1d.weight", "convolved", 1, "conv_kernel"),
        renamed("mixer.conv1d.bias", "convolved", when="conv_bias"),
        renamed("mixer.norm.weight", "inner"),
        renamed("mixer.out_proj.weight", "hidden", "inner"),
        renamed("mixer.out_proj.bias", "hidden", when="projection_bias"),
    )


def _mlp(native: str, hf: str) -> tuple[Rule, ...]:
    def renamed(name: str, *sizes: str, when: str | None = None) -> Rule:
        return Rule(native + name, Leaf(hf + name, *sizes), when=when, layers="mlp")

    return (
        renamed("mixer.up_proj.weight", "mlp_width", "hidden"),
        renamed("mixer.up_proj.bias", "mlp_width", when="mlp_bias"),
        renamed("mixer.down_proj.weight", "hidden", "mlp_width"),
        renamed("mixer.down_proj.bias", "hidden", when="mlp_bias"),
    )


LAYER = decoder.LAYER
BACKBONE = "backbone.layers.{layer}."
PREDICT = "mtp.layers.{predict}."

FAMILY = Family(
    name="nemotron_h",
    title="Nemotron-H",
    model_types=("nemotron_h",),
    architecture="NemotronHForCausalLM",
    shape=shape,
    rules=(
        Rule("model.embed_tokens.weight", Leaf("backbone.embeddings.weight", "vocab", "hidden")),
        Rule("model.norm.weight", Leaf("backbone.norm_f.weight", "hidden")),
        same("lm_head.weight", "vocab", "hidden"),
        Rule(LAYER + "norm.weight", Leaf(BACKBONE + "norm.weight", "hidden"), layers="decoder"),
        *_mamba(LAYER, BACKBONE),
        *_attention(LAYER, BACKBONE, "attention"),
        *_mlp(LAYER, BACKBONE),
        *_moe(LAYER, BACKBONE, "moe"),
        same(PREDICT + "enorm.weight", "hidden", layers="predict_first"),
        same(PREDICT + "hnorm.weight", "hidden", layers="predict_first"),
        same(PREDICT + "eh_proj.weight", "hidden", "twice_hidden", layers="predict_first"),
        same(PREDICT + "norm.weight", "hidden", layers="predict"),
        *_attention(PREDICT, PREDICT, "predict_attention"),
        *_moe(PREDICT, PREDICT, "predict_moe"),
        same(PREDICT + "final_layernorm.weight", "hidden", layers="predict_last"),
    ),
    tied=(),
    optional_layers={"predict": PREDICT},
)
