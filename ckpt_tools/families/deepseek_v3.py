"""DeepSeek V3 and R1 (`DeepseekV3ForCausalLM`), Kimi K2 and Moonlight: multi-head latent attention, shared experts,
group-limited routing with an FP32 correction bias, first dense layers, and layers for multi-token prediction.

Many repositories leave the latter out although their config counts them: the names decide.
"""

from ckpt_tools.families import decoder
from ckpt_tools.families.decoder import Config
from ckpt_tools.families.family import Family, fp8_forms
from ckpt_tools.layouts.layout import Shape
from ckpt_tools.layouts.rules import Concat, Leaf, Rule, same

LAYER = decoder.LAYER
ATTENTION = decoder.ATTENTION
EXPERT = LAYER + "mlp.experts.{expert}."
SHARED = LAYER + "mlp.shared_experts."


def shape(config: Config) -> Shape:
    """Layers below `first_k_dense_replace` are dense; the last `num_nextn_predict_layers` predict further tokens."""
    number = decoder.number
    heads = number(config, "num_attention_heads")
    nope, rope = number(config, "qk_nope_head_dim"), number(config, "qk_rope_head_dim")
    value, latent = number(config, "v_head_dim"), number(config, "kv_lora_rank")
    layers, predict = number(config, "num_hidden_layers"), config.get("num_nextn_predict_layers") or 0
    dense, step = config.get("first_k_dense_replace") or 0, config.get("moe_layer_freq") or 1
    shared = config.get("n_shared_experts") or 0
    width = number(config, "moe_intermediate_size")
    query_rank = config.get("q_lora_rank")
    flags = {
        "tied": bool(config.get("tie_word_embeddings", False)),
        "latent_query": query_rank is not None,
        "bias": bool(config.get("attention_bias", False)),
        "shared": bool(shared),
        "correction": config.get("topk_method", "noaux_tc") == "noaux_tc",
    }
    return Shape(
        sizes={
            "vocab": number(config, "vocab_size"),
            "hidden": number(config, "hidden_size"),
            "query": heads * (nope + rope),
            "query_rank": query_rank or 0,
            "latent": latent,
            "latent_and_rope": latent + rope,
            "key_value": heads * (nope + value),
            "attended": heads * value,
            "mlp_width": number(config, "intermediate_size"),
            "experts": number(config, "n_routed_experts", "num_local_experts"),
            "expert_width": width,
            "shared_width": width * shared,
            "twice_hidden": 2 * number(config, "hidden_size"),
        },
        layers=tuple("moe" if i >= dense and i % step == 0 else "dense" for i in range(layers))
        + ("predict",) * predict,
        experts=number(config, "n_routed_experts", "num_local_experts"),
        flags=frozenset(name for name, on in flags.items() if on),
    )


def _moe(layers: str) -> tuple[Rule, ...]:
    gate_up = Concat(
        Leaf(SHARED + "gate_proj.weight", "shared_width", "hidden"),
        Leaf(SHARED + "up_proj.weight", "shared_width", "hidden"),
    )
    correction = Leaf(LAYER + "mlp.gate.e_score_correction_bias", "experts", keep_dtype=True)
    return (
        *decoder.moe_mlp(
            router=LAYER + "mlp.gate.weight",
            gate=EXPERT + "gate_proj.weight",
            up=EXPERT + "up_proj.weight",
            down=EXPERT + "down_proj.weight",
            layers=layers,
        ),
        Rule(LAYER + "mlp.gate.e_score_correction_bias", correction, when="correction", layers=layers),
        Rule(LAYER + "mlp.shared_experts.gate_up_proj.weight", gate_up, when="shared", layers=layers),
        same(SHARED + "down_proj.weight", "hidden", "shared_width", when="shared", layers=layers),
    )


MATRICES = (
    *(ATTENTION + f"{name}.weight" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
    ATTENTION + "o_proj.weight",
    *(part + f"{name}_proj.weight" for part in (LAYER + "mlp.", EXPERT, SHARED) for name in ("gate", "up", "down")),
)

FAMILY = Family(
    name="deepseek_v3",
    title="DeepSeek V3",
    model_types=("deepseek_v3", "kimi_k2"),
    architecture="DeepseekV3ForCausalLM",
    shape=shape,
    rules=(
        *decoder.EMBEDDINGS,
        *decoder.NORMS,
        same(ATTENTION + "q_proj.weight", "query", "hidden", when="!latent_query"),
        same(ATTENTION + "q_a_proj.weight", "query_rank", "hidden", when="latent_query"),
        same(ATTENTION + "q_a_layernorm.weight", "query_rank", when="latent_query"),
        same(ATTENTION + "q_b_proj.weight", "query", "query_rank", when="latent_query"),
        same(ATTENTION + "kv_a_proj_with_mqa.weight", "latent_and_rope", "hidden"),
        same(ATTENTION + "kv_a_layernorm.weight", "latent"),
        same(ATTENTION + "kv_b_proj.weight", "key_value", "latent"),
        same(ATTENTION + "o_proj.weight", "hidden", "attended"),
        same(ATTENTION + "q_a_proj.bias", "query_rank", when="latent_query&bias"),
        same(ATTENTION + "kv_a_proj_with_mqa.bias", "latent_and_rope", when="bias"),
        same(ATTENTION + "o_proj.bias", "hidden", when="bias"),
        *decoder.DENSE_MLP,
        *_moe("moe"),
        *_moe("predict"),
        *decoder.PREDICT,
    ),
    dropped=decoder.DROPPED,
    forms=fp8_forms(*MATRICES, lists_plain_modules=False),
    optional_layers={"predict": LAYER},
)
