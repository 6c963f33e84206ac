"""Load a checkpoint with the stock transformers of this environment (4.57 or 5.x) and compare it with a reference.

Usage: python check_transformers.py CHECKPOINT REFERENCE [CHECKPOINT REFERENCE ...]; prints one JSON line a pair.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reader_check import Reference, Report, log_softmax, max_difference, run, tokenizer_agrees


def check(report: Report, checkpoint: Path, reference: Reference, options: dict[str, Any]) -> Report:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, **{"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True, **options}
    )
    model.float().eval()
    prompts = torch.from_numpy(reference.input_ids)
    with torch.no_grad():
        logits = model(prompts).logits.float().numpy()
    generated = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=reference.greedy.shape[1],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    greedy = generated[:, prompts.shape[1] :].numpy()
    return replace(
        report,
        loaded=True,
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        max_abs_logprob_difference=max_difference(iter([(log_softmax(logits), reference.log_probabilities())])),
        greedy=greedy.tolist(),
        greedy_equal=np.array_equal(greedy, reference.greedy),
        tokenizer_equal=tokenizer_agrees(checkpoint, reference),
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    major = transformers.__version__.split(".")[0]
    sys.exit(run(Report(f"transformers{major}", transformers.__version__), check))
