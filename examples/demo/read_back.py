"""Loads a repository with stock transformers alone: reports missing names, scores a text, writes a few words.

Usage: python read_back.py CHECKPOINT TEXT [--prompt WORDS]; prints one line of JSON.
Nothing of this project is imported.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers

WINDOW = 256
"""Tokens scored at once."""


def loss(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> float:
    """Mean cross-entropy in nats per token over whole windows of `tokens`, I64 [N]."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        scores = [model(window[None], labels=window[None]).loss.item() for window in windows]
    return sum(scores) / len(scores)


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a repository with stock transformers, score a text, generate.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompt", default="It is a truth universally acknowledged, that")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.checkpoint)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=torch.float32, output_loading_info=True
    )
    text = torch.tensor(tokenizer(arguments.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    prompt = tokenizer(arguments.prompt, return_tensors="pt")
    torch.manual_seed(0)
    generated = model.generate(**prompt, max_new_tokens=24, do_sample=True, top_k=20)
    report = {
        "model": type(model).__name__,
        "transformers": transformers.__version__,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "loss": round(loss(model, text), 4),
        "prompt": arguments.prompt,
        "text": tokenizer.decode(generated[0]),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
