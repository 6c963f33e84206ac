"""The matrix's checkpoints as data: a tiny config of every native family and its variants, and readers' limits."""

from __future__ import annotations

from typing import Any

VOCABULARY = 384

ATTENTION = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rope_theta": 50000.0,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
DENSE = ATTENTION | {"num_hidden_layers": 2, "intermediate_size": 96}
HEADS_SHARE_HIDDEN = DENSE | {"hidden_size": 128}
"""For the families whose readers derive head_dim from hidden_size / num_attention_heads."""
NEMOTRON_H = {name: value for name, value in ATTENTION.items() if name != "rope_theta"} | {
    "intermediate_size": 96,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 8,
}
NEMOTRON_H_MOE = NEMOTRON_H | {
    "hybrid_override_pattern": "MEM*E",
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
}
QWEN3_MOE = DENSE | {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
DELTA_NET = DENSE | {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"model_type": "qwen3_moe", **QWEN3_MOE},
    "qwen3_moe-tied": {"model_type": "qwen3_moe", **QWEN3_MOE, "tie_word_embeddings": True},
    "qwen3_moe-raw_weights": {"model_type": "qwen3_moe", **QWEN3_MOE, "norm_topk_prob": False},
    "qwen3_moe-dense_layers": {
        "model_type": "qwen3_moe",
        **QWEN3_MOE,
        "num_hidden_layers": 5,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "mixtral": {"model_type": "mixtral", **HEADS_SHARE_HIDDEN, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"model_type": "qwen3", **DENSE},
    "qwen2": {"model_type": "qwen2", **HEADS_SHARE_HIDDEN},
    "qwen2-tied": {"model_type": "qwen2", **HEADS_SHARE_HIDDEN, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", **HEADS_SHARE_HIDDEN},
    "llama-tied-rope_scaling": {
        "model_type": "llama",
        **HEADS_SHARE_HIDDEN,
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA3_ROPE,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        **ATTENTION,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **ATTENTION,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "nemotron_h": {"model_type": "nemotron_h", **NEMOTRON_H, "hybrid_override_pattern": "M-M*-"},
    "nemotron_h-moe": {"model_type": "nemotron_h", **NEMOTRON_H_MOE},
    "nemotron_h-latent_moe": {"model_type": "nemotron_h", **NEMOTRON_H_MOE, "moe_latent_size": 32},
    "qwen3_next": {"model_type": "qwen3_next", **DELTA_NET},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text", **DELTA_NET},
    "glm4_moe": {
        "model_type": "glm4_moe",
        **DENSE,
        "num_hidden_layers": 3,
        "attention_bias": True,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
    },
    "minimax_m2": {
        "model_type": "minimax_m2",
        **DENSE,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "rotary_dim": 16,
    },
    "olmoe": {
        "model_type": "olmoe",
        **HEADS_SHARE_HIDDEN,
        "num_key_value_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "llama4_text": {
        "model_type": "llama4_text",
        **ATTENTION,
        "num_hidden_layers": 4,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1,
        "num_local_experts": 4,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **DENSE,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 8,
        "tie_word_embeddings": True,
    },
    "llama-biases": {"model_type": "llama", **HEADS_SHARE_HIDDEN, "attention_bias": True, "mlp_bias": True},
}

LIMITS: dict[tuple[str, str], str] = {
    ("sglang", "qwen3_moe-dense_layers"): "SGLang ignores `mlp_only_layers` and `decoder_sparse_step`",
    ("sglang", "qwen3_moe-tied"): "SGLang's Qwen3-MoE ignores `tie_word_embeddings`",
    ("sglang", "llama-biases"): "SGLang's Llama ignores `mlp_bias`",
}
"""(reader, case) -> why the reader gives wrong logits for it, from the stock checkpoint just as from ours."""

NEMOTRON_CASES = ("nemotron_h", "nemotron_h-moe", "nemotron_h-latent_moe")
NOT_RUN: dict[tuple[str, str], str] = {
    **{("transformers4", case): "it has no such class" for case in NEMOTRON_CASES},
    **{("sglang", case): "its CPU build has no Mamba-2 scan and no experts without a gate" for case in NEMOTRON_CASES},
    ("transformers4", "minimax_m2"): "it has no MiniMax-M2",
    ("sglang", "gpt_oss"): "its CPU build has no attention with sinks",
    ("sglang", "minimax_m2"): "its q/k norms over all heads are CUDA kernels",
    ("sglang", "llama4_text"): "its q/k norms are in BF16, and its CPU experts do not take Llama 4's routing",
    ("sglang", "deepseek_v3"): "its CPU build has no latent attention",
    ("transformers4", "qwen3_5_moe"): "transformers 4 has no Qwen3.5",
    ("sglang", "qwen3_next"): "its CPU build has no gated DeltaNet",
    ("sglang", "qwen3_5_moe"): "it has a class for the multimodal model only, and its CPU build no gated DeltaNet",
    ("vllm", "qwen3_next"): "its CPU kernel of gated DeltaNet takes BF16 only; the matrix compares in FP32",
    ("vllm", "qwen3_5_moe"): "its CPU kernel of gated DeltaNet takes BF16 only; the matrix compares in FP32",
    ("vllm", "deepseek_v3"): "its answers for this tiny config differ from transformers'; why is not known yet",
}
"""(reader, case) that is not asked, nor made where the reader is a writer too, and why."""
