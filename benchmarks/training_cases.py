"""The shapes that training is measured on, and the model FLOPs of their tokens."""

from __future__ import annotations

import math
from typing import Any

from ckpt_tools.families import layout_for

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "tie_word_embeddings": False,
}
NEMOTRON_3_NANO = {
    "model_type": "nemotron_h",
    "vocab_size": 131_072,
    "hidden_size": 2688,
    "intermediate_size": 1856,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
}
CASES: dict[str, dict[str, Any]] = {
    "qwen3-30b-8l": {**QWEN3_30B, "num_hidden_layers": 8},
    "qwen3-30b-24l": {**QWEN3_30B, "num_hidden_layers": 24},
    "qwen3-30b": {**QWEN3_30B, "num_hidden_layers": 48},
    "gpt-oss-20b-6l": {**GPT_OSS_20B, "num_hidden_layers": 6},
    "nemotron-3-nano-9l": {**NEMOTRON_3_NANO, "hybrid_override_pattern": "MEMEM*EME", "num_hidden_layers": 9},
    "tiny": {
        **QWEN3_30B,
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "num_attention_heads": 8,
        "head_dim": 16,
    },
}
"""Configs; the shapes of the published models with fewer layers. Names of the full models carry no number of layers."""

OURS: dict[str, str | dict[str, str]] = {
    "ours": "auto",
    "ours-without-graphs": "auto",
    "ours-eager": {"layers": "eager"},
    "ours-grouped_mm": {"experts": "grouped_mm"},
    "ours-fused": {"experts": "fused"},
    "ours-sonic": {"experts": "sonic"},
    "ours-cudnn": {"sdpa": "cudnn"},
    "ours-all_to_all": {"dispatch": "all_to_all"},
    "ours-symmetric": {"dispatch": "symmetric"},
}
"""Our implementations -> their `backend`."""

PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4}
"""Part of a GPU's name -> dense BF16 rate of its datasheet (SXM), which model FLOPs utilisation refers to."""


def flops_per_token(config: dict[str, Any], sequence: int) -> float:
    """Model FLOPs of one token, forward and backward: 6 for each weight of a matrix that it meets (of the experts, the
    chosen ones; not the embedding), and attention.

    Attention to C positions on average: forward 4 * heads * head_dim * C a layer, backward twice that. C is half of the
    sequence, or what a sliding window leaves of it. The scans of Mamba-2 layers are not counted.
    """
    layout = layout_for(config)
    if layout is None:
        raise ValueError(f"{config['model_type']} is of no known family")
    experts = next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config)
    met = 0.0
    for name, leaf in layout.leaves.items():
        if len(leaf.shape) < 2 or "embed" in name or "conv1d" in name or name.endswith("bias"):
            continue
        chosen = config["num_experts_per_tok"] / experts if ".experts." in name else 1.0
        met += math.prod(leaf.shape) * chosen
    pattern = config.get("hybrid_override_pattern")
    layers = pattern.count("*") if pattern else config["num_hidden_layers"]
    heads = config["num_attention_heads"] * config["head_dim"]
    seen = layers * sequence / 2
    if window := config.get("sliding_window"):
        # Every other layer has a window.
        seen = (layers - layers // 2) * (window - window**2 / (2 * sequence)) + layers // 2 * sequence / 2
    return 6 * met + 3 * 4 * heads * seen
