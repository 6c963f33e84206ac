"""Tiny configs of every native family, and transformers weights rearranged into the native names for comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from automodel.compat import TRANSFORMERS_5
from automodel.models import NATIVE_MODELS, NativeCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
QWEN3_MOE = {
    **SIZES,
    "head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT_OSS = {
    **SIZES,
    "intermediate_size": 64,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
    "router_aux_loss_coef": 0.01,
}
DEEPSEEK_V3 = {
    **SIZES,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
NEMOTRON_H = {
    **{name: size for name, size in SIZES.items() if name != "num_hidden_layers"},
    "head_dim": 16,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "mlp"],
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 12,
    "chunk_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
}
DELTA_NET = {
    **SIZES,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
SHARED_EXPERT = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}


def rope(theta: float, scaling: Mapping[str, object] | None = None) -> dict[str, object]:
    """Config arguments for a rope base and scaling in the installed transformers' spelling."""
    if TRANSFORMERS_5:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **(scaling or {})}}
    return {"rope_theta": theta, "rope_scaling": dict(scaling) if scaling else None}


PARTIAL_ROPE = {**rope(1e5, {"partial_rotary_factor": 0.5} if TRANSFORMERS_5 else None), "partial_rotary_factor": 0.5}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**QWEN3_MOE),
    "qwen3_moe sparse step, no renormalisation, biases": lambda: transformers.Qwen3MoeConfig(
        **{**QWEN3_MOE, "mlp_only_layers": [], "norm_topk_prob": False},
        decoder_sparse_step=2,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "qwen3_moe sliding window": lambda: transformers.Qwen3MoeConfig(**QWEN3_MOE, **SLIDING),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "mixtral sliding window": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, sliding_window=6),
    "gpt_oss": lambda: transformers.GptOssConfig(**GPT_OSS, **rope(1.5e5, YARN_ROPE)),
    # Shapes cannot tell the orientation of these experts; sqrt(head_dim) is not exact in any dtype.
    "gpt_oss square experts, truncated yarn": lambda: transformers.GptOssConfig(
        **{**GPT_OSS, "intermediate_size": 32, "head_dim": 24, "tie_word_embeddings": True},
        **rope(1e4, {**YARN_ROPE, "truncate": True}),
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**DEEPSEEK_V3, **rope(1e4)),
    "deepseek_v3 no query latent, one group, biases, yarn": lambda: transformers.DeepseekV3Config(
        **{**DEEPSEEK_V3, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
        norm_topk_prob=False,
        attention_bias=True,
        rope_interleave=False,
        tie_word_embeddings=True,
        **rope(1e4, {**YARN_ROPE, "truncate": True, "mscale": 1.0, "mscale_all_dim": 0.7}),
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**DELTA_NET, **SHARED_EXPERT),
    "qwen3_next one value head a key head, biases, dense layer, no renormalisation": lambda: (
        transformers.Qwen3NextConfig(
            **{**DELTA_NET, "linear_num_key_heads": 4, "layer_types": ["full_attention", *["linear_attention"] * 2]},
            **SHARED_EXPERT,
            attention_bias=True,
            mlp_only_layers=[1],
            norm_topk_prob=False,
            tie_word_embeddings=True,
            **PARTIAL_ROPE,
        )
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3 sliding layers": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, **SLIDING),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **rope(1e6)),
    "qwen2 sliding layers": lambda: transformers.Qwen2Config(**SIZES, **SLIDING),
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama biases, llama3 rope": lambda: transformers.LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **rope(5e5, LLAMA3_ROPE)
    ),
}
if hasattr(transformers, "Qwen3_5TextConfig"):
    CONFIGS |= {
        "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(
            **{k: v for k, v in DELTA_NET.items() if k != "intermediate_size"}, **SHARED_EXPERT
        ),
        "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**DELTA_NET, tie_word_embeddings=True),
    }
if hasattr(transformers, "NemotronHConfig"):
    CONFIGS |= {
        "nemotron_h": lambda: transformers.NemotronHConfig(**NEMOTRON_H),
        "nemotron_h dense, biases of MLPs": lambda: transformers.NemotronHConfig(
            **{**NEMOTRON_H, "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
            mlp_bias=True,
            use_conv_bias=False,
        ),
        "nemotron_h latent experts": lambda: transformers.NemotronHConfig(
            **{**NEMOTRON_H, "n_group": 1}, moe_latent_size=16, norm_topk_prob=False
        ),
    }


def installed(*names: str) -> list[str]:
    """Those of `names` whose config class the installed transformers has."""
    return [name for name in names if name in CONFIGS]


every_config = pytest.mark.parametrize("name", CONFIGS)


def native_state(hf: Mapping[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """A transformers state dict (or gradients, by the same names) under native names."""
    renamed = {"model.embeddings.weight": "model.embed_tokens.weight", "model.norm_f.weight": "model.norm.weight"}
    out = {renamed.get(name, name): tensor for name, tensor in hf.items() if ".layers." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        part = {name.removeprefix(prefix): tensor for name, tensor in hf.items() if name.startswith(prefix)}
        part = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in part.items()}
        out |= {prefix + name: tensor for name, tensor in _native_layer(part, config).items()}
    return out


def _native_layer(part: dict[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    out = _gpt_oss_mlp(part) if config.model_type == "gpt_oss" else {}
    if "mlp.shared_experts.gate_proj.weight" in part:
        halves = [part.pop(f"mlp.shared_experts.{name}_proj.weight") for name in ("gate", "up")]
        out["mlp.shared_experts.gate_up_proj.weight"] = torch.cat(halves)
    out |= _delta_net(part, config)
    for name in ("A_log", "D", "dt_bias"):
        if f"mixer.{name}" in part:
            out[f"mixer.ssm.{name}"] = part.pop(f"mixer.{name}")
    groups = config.num_key_value_heads
    for attention in ("self_attn", "mixer"):
        for kind in ("weight", "bias"):
            if f"{attention}.k_proj.{kind}" in part:
                heads = [part.pop(f"{attention}.{name}_proj.{kind}") for name in "qkv"]
                if "linear_num_key_heads" in config.to_dict():
                    query_and_gate = heads[0].unflatten(0, (groups, -1, 2, config.head_dim))
                    heads[0] = query_and_gate.transpose(1, 2).flatten(0, 3)
                grouped = torch.cat([h.unflatten(0, (groups, -1)) for h in heads], 1)
                out[f"{attention}.qkv_proj.{kind}"] = grouped.flatten(0, 1)
    for kind in ("weight", "bias"):
        gate, up = part.pop(f"mlp.gate_proj.{kind}", None), part.pop(f"mlp.up_proj.{kind}", None)
        if gate is not None:
            out[f"mlp.gate_up_proj.{kind}"] = torch.cat([gate, up])
    for names in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        if f"mlp.experts.0.{names[0]}.weight" in part:
            experts = range(len([name for name in part if name.endswith(f"{names[0]}.weight")]))
            gate, up, down = (
                torch.stack([part.pop(f"mlp.experts.{e}.{name}.weight") for e in experts]) for name in names
            )
            out |= {"mlp.experts.gate_up_proj": torch.cat([gate, up], 1), "mlp.experts.down_proj": down}
    return out | part


def _delta_net(part: dict[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Takes out of `part` what Qwen3-Next and Qwen3.5 call or order otherwise."""
    out = {}
    if "mlp.shared_expert.gate_proj.weight" in part:
        gate, up, down = (part.pop(f"mlp.shared_expert.{name}_proj.weight") for name in ("gate", "up", "down"))
        out = {
            "mlp.shared_experts.gate_up_proj.weight": torch.cat([gate, up]),
            "mlp.shared_experts.down_proj.weight": down,
        }
    for name in ("A_log", "dt_bias"):
        if f"linear_attn.{name}" in part:
            out[f"linear_attn.decay.{name}"] = part.pop(f"linear_attn.{name}")
    if "linear_attn.in_proj_qkv.weight" in part:
        qkv, z, b, a = (part.pop(f"linear_attn.in_proj_{name}.weight") for name in ("qkv", "z", "b", "a"))
        groups = config.linear_num_key_heads
        keys = groups * config.linear_key_head_dim
        for name, parts in (("qkvz", (*qkv.split((keys, keys, len(z))), z)), ("ba", (b, a))):
            grouped = torch.cat([x.unflatten(0, (groups, -1)) for x in parts], 1)
            out[f"linear_attn.in_proj_{name}.weight"] = grouped.flatten(0, 1)
    return out


def _gpt_oss_mlp(part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Takes out of `part` what GPT-OSS has in another order: gate and up take turns, and experts are `[in, out]`."""
    out = {f"mlp.gate.{kind}": part.pop(f"mlp.router.{kind}") for kind in ("weight", "bias")}
    out["mlp.experts.down_proj"] = part.pop("mlp.experts.down_proj").transpose(1, 2)
    gate_up = part.pop("mlp.experts.gate_up_proj")
    out["mlp.experts.gate_up_proj"] = torch.cat([gate_up[..., ::2], gate_up[..., 1::2]], 2).transpose(1, 2)
    bias = part.pop("mlp.experts.gate_up_proj_bias")
    out["mlp.experts.gate_up_proj_bias"] = torch.cat([bias[:, ::2], bias[:, 1::2]], 1)
    return out


def pair(
    name: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0
) -> tuple[PreTrainedModel, NativeCausalLM]:
    """The transformers model of a tiny config with random weights, and the native one with the same weights."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    # transformers has no sinks in SDPA; eager is the reference for both.
    config._attn_implementation = reference = "eager" if config.model_type == "gpt_oss" else attention
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=reference)
    for parameter in theirs.parameters():
        # Norm weights and biases are constant when fresh: a mistake in where they apply would not show.
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    for buffer_name, buffer in theirs.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.rand_like(buffer) * 0.3)
    theirs = theirs.to(dtype).eval()
    ours = NATIVE_MODELS[config.model_type](CONFIGS[name]()).to(dtype).eval()
    ours.config._attn_implementation = attention
    state = native_state(theirs.state_dict(), config)
    ours.load_state_dict(state, strict=True)
    return theirs, ours


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length] without the special ones."""
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over largest magnitude, in float64."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
