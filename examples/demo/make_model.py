"""Makes the demo's source: a small Qwen3-MoE with random weights, written by stock transformers, with a real tokenizer.

Usage: python make_model.py DESTINATION. Layer 0 is dense (`mlp_only_layers`); the other layers have eight experts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
import transformers

TOKENIZER = Path(__file__).parent / "tokenizer"


def config(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.Qwen3MoeConfig:
    return transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a small Qwen3-MoE repository with stock transformers.")
    parser.add_argument("destination", type=Path)
    destination = parser.parse_args().destination
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    model = transformers.Qwen3MoeForCausalLM(config(tokenizer))
    model.save_pretrained(destination, max_shard_size="20MB")
    for file in sorted(TOKENIZER.iterdir()):
        shutil.copyfile(file, destination / file.name)
    shards = len(list(destination.glob("*.safetensors")))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{type(model).__name__}, {millions:.1f}M parameters, {shards} files, transformers {transformers.__version__}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
