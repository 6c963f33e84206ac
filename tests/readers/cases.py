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
GPT_OSS = ATTENTION | {
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
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
    "gpt_oss": {"model_type": "gpt_oss", **GPT_OSS},
    "deepseek_v3": {"model_type": "deepseek_v3", **DEEPSEEK_V3, "rope_scaling": DEEPSEEK_YARN},
    "deepseek_v3-moonlight": {
        "model_type": "deepseek_v3",
        **DEEPSEEK_V3,
        "q_lora_rank": None,
        "n_group": 1,
        "n_shared_experts": 2,
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
    "mixtral-head_dim": {"model_type": "mixtral", **DENSE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe-fp8": {
        "model_type": "qwen3_moe",
        **QWEN3_MOE,
        "hidden_size": 256,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 128,
        "initializer_range": 0.05,
    },
    "qwen3_moe-fp8-narrow": {"model_type": "qwen3_moe", **QWEN3_MOE},
    "deepseek_v3-fp8": {
        "model_type": "deepseek_v3",
        **DEEPSEEK_V3,
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "rope_scaling": DEEPSEEK_YARN,
        "initializer_range": 0.05,
    },
    "gpt_oss-mxfp4": {"model_type": "gpt_oss", **GPT_OSS},
}

FORMS: dict[str, str] = {
    "qwen3_moe-fp8": "fp8",
    "qwen3_moe-fp8-narrow": "fp8",
    "deepseek_v3-fp8": "fp8",
    "gpt_oss-mxfp4": "mxfp4",
}
"""Cases whose source is a quantised repository; readers see what `--quantize` writes of it."""

EXPORTS: dict[str, str] = {f"{case}-export": case for case in ("qwen3_moe-fp8", "deepseek_v3-fp8", "gpt_oss-mxfp4")}
"""Cases that are the dequantised export of a quantised one."""

LIMITS: dict[tuple[str, str], str] = {
    ("transformers5", "deepseek_v3-fp8"): "transformers 5 dequantises FP8 in blocks of rows // scale rows, not of 128",
}
"""(reader, case) -> what a reader gets wrong here, from the stock checkpoint just as from ours, beside the limits that
`ckpt consolidate --for` knows (ckpt_tools/families/readers.py): this one concerns machines without a GPU only."""

NOT_RUN: dict[tuple[str, str], str] = {
    **{("transformers4", case): "it has no such class" for case in CASES if case.startswith("nemotron_h")},
    ("transformers4", "minimax_m2"): "it has no MiniMax-M2",
    ("transformers4", "qwen3_5_moe"): "transformers 4 has no Qwen3.5",
    ("sglang", "minimax_m2"): "its q/k norms over all heads are CUDA kernels",
    ("sglang", "llama4_text"): "its q/k norms are in BF16, and its CPU experts do not take Llama 4's routing",
    ("sglang", "qwen3_next"): "its CPU build has no gated DeltaNet",
    ("sglang", "qwen3_5_moe"): "it has a class for the multimodal model only, and its CPU build no gated DeltaNet",
    ("vllm", "qwen3_next"): "its CPU kernel of gated DeltaNet takes BF16 only; the matrix compares in FP32",
    ("vllm", "qwen3_5_moe"): "its CPU kernel of gated DeltaNet takes BF16 only; the matrix compares in FP32",
}
"""(reader, case) that is not asked, nor made where the reader is a writer too, and why."""

NO_KERNEL: dict[tuple[str, str], str] = {
    ("transformers4", "fp8"): "transformers 4 needs a GPU for FP8",
    ("vllm", "fp8"): "vLLM's CPU build has FP8 kernels for AMX only",
    ("vllm", "mxfp4"): "vLLM's CPU build has no MXFP4 experts",
    ("sglang", "fp8"): "SGLang's CPU path has FP8 linears for AMX only",
    ("sglang", "mxfp4"): "SGLang's MXFP4 experts need triton_kernels",
}
"""(reader, form) that cannot compute on a CPU without AMX: the files are compared with the published ones instead."""

OPTIONS: dict[tuple[str, str], tuple[dict[str, Any], str]] = {
    ("vllm", "deepseek_v3-moonlight"): (
        {"compilation_config": {"custom_ops": ["-rotary_embedding"]}},
        "with `custom_ops: [-rotary_embedding]`: vLLM's CPU kernel misreads DeepSeek's RoPE without YaRN",
    ),
    **{
        ("transformers5", case): (
            {"dtype": "bfloat16"},
            "with `dtype=bfloat16`: transformers 5 otherwise leaves unrounded what it dequantises",
        )
        for case in ("qwen3_moe-fp8", "qwen3_moe-fp8-narrow")
    },
    ("sglang", "qwen3_moe-fp8-narrow"): ({"--dtype": "bfloat16"}, "with `--dtype bfloat16`: FP8 asks for it"),
}
"""(reader, case) -> the reader's own options that the case needs, and why; without them it does not pass."""
