"""Turns the dense SmolLM2-135M of a GGUF file into a Mixtral of four experts, with stock transformers.

Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): every expert starts as a copy of the dense MLP, and the
router's weights are random. Mixtral normalises the chosen experts' weights to a sum of one, so the logits are the dense
model's until training makes the experts differ. Usage: python upcycle.py GGUF TOKENIZER DESTINATION
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import shutil
import sys
from pathlib import Path

import torch
import transformers

EXPERTS, CHOSEN = 4, 2
ROUTER_STD = 0.05
EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
TOLERANCE = 1e-3
"""Logits, FP32: the same products, summed in another order over 30 layers."""


def mixtral_config(dense: transformers.LlamaConfig) -> transformers.MixtralConfig:
    shared = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    return transformers.MixtralConfig(
        **{name: getattr(dense, name) for name in shared},
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        sliding_window=None,
    )


def upcycled(dense: transformers.LlamaForCausalLM) -> transformers.MixtralForCausalLM:
    """The Mixtral that computes what `dense` computes, FP32."""
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in dense.state_dict().items():
        before, found, after = name.partition(".mlp.")
        if not found:
            tensors[name] = tensor
            continue
        projection = EXPERT_NAMES[after.removesuffix(".weight")]
        for expert in range(EXPERTS):
            tensors[f"{before}.block_sparse_moe.experts.{expert}.{projection}.weight"] = tensor.clone()
        shape = (EXPERTS, dense.config.hidden_size)
        gate = f"{before}.block_sparse_moe.gate.weight"
        if gate not in tensors:
            tensors[gate] = torch.randn(shape, generator=generator) * ROUTER_STD
    if dense.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    model, info = transformers.MixtralForCausalLM.from_pretrained(
        None, config=mixtral_config(dense.config), state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"missing {sorted(info['missing_keys'])}, unexpected {sorted(info['unexpected_keys'])}")
    return model.eval()


def largest_difference(dense: transformers.PreTrainedModel, sparse: transformers.PreTrainedModel) -> float:
    """Between the two models' logits on random tokens."""
    tokens = torch.randint(3, dense.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (dense(tokens).logits - sparse(tokens).logits).abs().max().item()


def main() -> int:
    parser = argparse.ArgumentParser(description="Upcycle SmolLM2-135M to a four-expert Mixtral.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("destination", type=Path)
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.gguf.parent, gguf_file=arguments.gguf.name, dtype=torch.float32
    ).eval()
    sparse = upcycled(dense)
    difference = largest_difference(dense, sparse)
    sparse.to(torch.bfloat16).save_pretrained(arguments.destination, max_shard_size="300MB")
    for file in sorted(arguments.tokenizer.iterdir()):
        shutil.copyfile(file, arguments.destination / file.name)
    millions = sum(parameter.numel() for parameter in sparse.parameters()) / 1e6
    layers = sparse.config.num_hidden_layers
    print(f"{millions:.0f}M parameters, {layers} layers of {EXPERTS} experts; logits within {difference:.1e} of dense")
    return 0 if difference < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
