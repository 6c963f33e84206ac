"""Tiny models and batches that tests of parallel code and training share."""

from __future__ import annotations

import torch
from torch import nn
from transformers import DeepseekV3Config, GptOssConfig, LlamaConfig, Qwen3MoeConfig, Qwen3NextConfig

from automodel.models.deepseek_v3 import NeMoDeepseekV3ForCausalLM
from automodel.models.gpt_oss import NeMoGptOssForCausalLM
from automodel.models.llama import NeMoLlamaForCausalLM
from automodel.models.qwen3_moe import NeMoQwen3MoeForCausalLM
from automodel.models.qwen3_next import NeMoQwen3NextForCausalLM

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


def gpt_oss_model(num_experts: int = 4, *, seed: int = 0) -> nn.Module:
    """A tiny native GPT-OSS in FP32: biases, sinks and a sliding layer, none of them zero."""
    torch.manual_seed(seed)
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
        sliding_window=5,
        max_position_embeddings=64,
        use_cache=False,
        initializer_range=0.1,
    )
    model = NeMoGptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            nn.init.normal_(parameter, std=0.5)
    return model


def deepseek_v3_model(*, seed: int = 0, predict_layers: int = 1) -> nn.Module:
    """A tiny native DeepSeek V3 in FP32: a dense layer, one with experts, and one for multi-token prediction."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=20,
        kv_lora_rank=24,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        first_k_dense_replace=1,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=3,
        topk_group=2,
        n_shared_experts=2,
        moe_intermediate_size=16,
        max_position_embeddings=64,
        use_cache=False,
        initializer_range=0.1,
    )
    model = NeMoDeepseekV3ForCausalLM(config, predict_layers=predict_layers)
    # Not a BF16 number: a rounded bias would change no loss, but it would show.
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.rand(6) * 0.3 + 2**-12)
    return model


def nemotron_h_model(*, seed: int = 0, predict_layers: int = 2) -> nn.Module:
    """A tiny native Nemotron-H in FP32: Mamba-2, latent experts, attention, and two held layers for prediction."""
    from transformers import NemotronHConfig

    from automodel.models.nemotron_h import NeMoNemotronHForCausalLM

    torch.manual_seed(seed)
    config = NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=6,
        mamba_head_dim=4,
        n_groups=2,
        ssm_state_size=4,
        chunk_size=8,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=24,
        moe_latent_size=16,
        num_nextn_predict_layers=1,
        use_cache=False,
        initializer_range=0.1,
    )
    model = NeMoNemotronHForCausalLM(config, predict_layers=predict_layers)
    # Not BF16 numbers: rounded values would show.
    model.model.layers[1].mixer.gate.e_score_correction_bias.copy_(torch.rand(6) * 0.3 + 2**-12)
    return model


def qwen3_next_model(*, seed: int = 0, predict_layers: int = 1) -> nn.Module:
    """A tiny native Qwen3-Next in FP32: a layer of each mixer, and a block for multi-token prediction."""
    torch.manual_seed(seed)
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_key_heads=3,
        linear_num_value_heads=6,
        linear_key_head_dim=8,
        linear_value_head_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=12,
        max_position_embeddings=64,
        use_cache=False,
        initializer_range=0.1,
    )
    return NeMoQwen3NextForCausalLM(config, predict_layers=predict_layers)


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
