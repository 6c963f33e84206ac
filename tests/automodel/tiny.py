"""Tiny models and batches that tests of parallel code and training share."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, Qwen3MoeConfig

from automodel.models.llama import NeMoLlamaForCausalLM
from automodel.models.qwen3_moe import NeMoQwen3MoeForCausalLM

VOCABULARY = 64


def moe_config(num_experts: int = 4, **changes: object) -> Qwen3MoeConfig:
    values: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": num_experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    return Qwen3MoeConfig(**(values | changes))


def moe_model(num_experts: int = 4, *, seed: int = 0, **changes: object) -> nn.Module:
    """A tiny native Qwen3-MoE in FP32, with the same values on every process."""
    torch.manual_seed(seed)
    return NeMoQwen3MoeForCausalLM(moe_config(num_experts, **changes))


def dense_model(*, seed: int = 0, **changes: object) -> nn.Module:
    """A tiny native Llama in FP32."""
    torch.manual_seed(seed)
    values: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "use_cache": False,
    }
    return NeMoLlamaForCausalLM(LlamaConfig(**(values | changes)))


def batch(rows: int, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)
