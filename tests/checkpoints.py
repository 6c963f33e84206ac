"""Tiny checkpoints for tests, made without torch: every byte random, so that any misplaced element shows."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.core.dtypes import DTYPES, DType
from ckpt_tools.families import layout_for
from ckpt_tools.formats import hf

DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
DELTA_NET: dict[str, Any] = {
    **DECODER,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
}
SHARED_EXPERT: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **DECODER,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
    },
    "mixtral": {
        **DECODER,
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3": {**DECODER, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "qwen2": {**DECODER, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "deepseek_v3": {
        **DECODER,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_nextn_predict_layers": 1,
    },
    "gpt_oss": {
        **DECODER,
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "hidden_size": 32,
        "attention_bias": True,
    },
    "nemotron_h": {
        **DECODER,
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": "M*E-",
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 4,
        "conv_kernel": 4,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "moe_latent_size": 16,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
    },
    "qwen3_next": {
        **DELTA_NET,
        **SHARED_EXPERT,
        "model_type": "qwen3_next",
        "architectures": ["Qwen3NextForCausalLM"],
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_only_layers": [2],
        "decoder_sparse_step": 1,
    },
    "qwen3_5_moe": {
        **DELTA_NET,
        **SHARED_EXPERT,
        "model_type": "qwen3_5_moe_text",
        "architectures": ["Qwen3_5MoeForCausalLM"],
    },
    "qwen3_5": {**DELTA_NET, "model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]},
    "llama": {
        **DECODER,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
    },
    "glm4_moe": {
        **DECODER,
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 24,
        "attention_bias": True,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 1,
    },
    "minimax_m2": {
        **DECODER,
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rotary_dim": 4,
    },
    "olmoe": {
        **DECODER,
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": True,
    },
    "llama4_text": {
        **DECODER,
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "num_hidden_layers": 3,
        "intermediate_size": 24,
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
    "gemma3_text": {
        **DECODER,
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
}


def write_repository(
    root: Path,
    tensors: Mapping[str, tuple[DType, tuple[int, ...]]],
    config: Mapping[str, Any] | None = None,
    *,
    max_shard_size: int = 20_000,
    seed: int = 0,
) -> Path:
    """A repository with the given tensors, random bytes in each, and a few side files."""
    generator = random.Random(seed)
    target = hf.plan_repository(tensors, max_shard_size=max_shard_size)
    root.mkdir(parents=True)
    for file, size in target.store.files.items():
        content = bytearray(generator.randbytes(size))
        for frame in target.framing:
            if frame.file == file:
                content[frame.position : frame.position + len(frame.data)] = frame.data
        (root / file).write_bytes(content)
    for name, data in target.documents.items():
        (root / name).write_bytes(data)
    if config is not None:
        (root / "config.json").write_text(json.dumps(config, indent=2))
        (root / "tokenizer.json").write_bytes(b'{"version": "1.0"}\n')
        (root / "generation_config.json").write_bytes(b'{"eos_token_id": 2}')
    return root


def make_repository(
    root: Path, family: str = "qwen3_moe", *, seed: int = 0, dtype: str = "BF16", **config: Any
) -> Path:
    """A tiny Hugging Face repository of a family; keyword arguments change its config."""
    described = {**CONFIGS[family], **config}
    layout = layout_for(described)
    assert layout is not None
    tensors = {name: (DTYPES[dtype], leaf.shape) for name, leaf in layout.leaves.items()}
    return write_repository(root, tensors, described, seed=seed)


def tensor_bytes(root: Path) -> dict[str, bytes]:
    """The raw bytes of every tensor of a repository, read with none of the engine."""
    store = hf.open_repository(root).store
    found = {}
    for name, tensor in store.tensors.items():
        chunk = tensor.chunks[0]
        with open(root / chunk.file, "rb") as file:
            file.seek(chunk.position)
            found[name] = file.read(tensor.nbytes)
    return found
