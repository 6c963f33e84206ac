"""Every native family on a GPU, with the fastest kernels in BF16 and the references in FP32, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DECODER = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
EXPERTS = {"num_experts_per_tok": 4, "moe_intermediate_size": 128}
CONFIGS = {
    "gpt_oss": {**DECODER, "num_local_experts": 16, "num_experts_per_tok": 4, "sliding_window": 64},
    "deepseek_v3": {
        **DECODER,
        **EXPERTS,
        "num_key_value_heads": 8,
        "head_dim": 32,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
    "nemotron_h": {
        **{name: size for name, size in DECODER.items() if name != "num_hidden_layers"},
        **EXPERTS,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "n_groups": 2,
        "ssm_state_size": 64,
        "n_routed_experts": 16,
        "n_group": 1,
        "topk_group": 1,
        "moe_shared_expert_intermediate_size": 128,
    },
    "qwen3_next": {
        **DECODER,
        **EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 16,
        "shared_expert_intermediate_size": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "mixtral": {**DECODER, "num_local_experts": 8, "num_experts_per_tok": 2},
    "llama": DECODER,
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03)])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_gradients_are_those_of_float32_transformers(
    tmp_path: Path, family: str, dtype: str, tolerance: float
) -> None:
    from automodel import NeMoAutoModelForCausalLM

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family])
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    theirs = theirs.cuda().train()
    backend = "torch" if dtype == "float32" else "auto"
    ours = NeMoAutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=getattr(torch, dtype), device="cuda", backend=backend
    ).train()
    ids = torch.randint(0, 512, (2, 256), device="cuda")
    expected, actual = theirs(ids, labels=ids), ours(ids, labels=ids)
    # The median over positions: rounding sends a few tokens to another expert.
    error = (actual.logits.float() - expected.logits).square().mean(-1).sqrt().median()
    assert error < tolerance * expected.logits.square().mean().sqrt(), ours.backend_report()
    expected.loss.backward()
    skipping = ours(ids, labels=ids, skip_logits=True)
    torch.testing.assert_close(skipping.loss.float(), expected.loss, rtol=tolerance, atol=tolerance)
    skipping.loss.backward()
    mine, reference = ours.lm_head.weight.grad.float(), theirs.lm_head.weight.grad
    assert (mine - reference).norm() < 2.5 * tolerance * reference.norm()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())
