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
QWEN3_MOE = DENSE | {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}
DEEPSEEK_V3 = ATTENTION | {
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
    "v_head_dim": 16,
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
    "deepseek_v3": {"model_type": "deepseek_v3", **DEEPSEEK_V3, "rope_scaling": DEEPSEEK_YARN},
    "deepseek_v3-moonlight": {
        "model_type": "deepseek_v3",
        **DEEPSEEK_V3,
        "q_lora_rank": None,
        "n_group": 1,
        "n_shared_experts": 2,
    },
    "llama-biases": {"model_type": "llama", **HEADS_SHARE_HIDDEN, "attention_bias": True, "mlp_bias": True},
}

LIMITS: dict[tuple[str, str], str] = {
    ("sglang", "qwen3_moe-dense_layers"): "SGLang ignores `mlp_only_layers` and `decoder_sparse_step`",
    ("sglang", "qwen3_moe-tied"): "SGLang's Qwen3-MoE ignores `tie_word_embeddings`",
    ("sglang", "llama-biases"): "SGLang's Llama ignores `mlp_bias`",
}
"""(reader, case) -> why the reader gives wrong logits for it, from the stock checkpoint just as from ours."""

NOT_RUN: dict[tuple[str, str], str] = {
    ("sglang", "gpt_oss"): "its CPU build has no attention with sinks",
    ("sglang", "deepseek_v3"): "its CPU build has no latent attention",
    ("vllm", "deepseek_v3"): "its answers for this tiny config differ from transformers'; why is not known yet",
}
"""(reader, case) that is not asked, and why."""
