"""Load a checkpoint with vLLM's CPU build; compare full-vocabulary log-probabilities and greedy tokens.

Usage: python check_vllm.py CHECKPOINT REFERENCE; prints one JSON line. vLLM runs in FP32 in this process, unmodified
but for what vllm_torch.py says.
"""

from __future__ import annotations

import os

os.environ.update(
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"),
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    VLLM_MLA_DISABLE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_AOT_COMPILE="0",
)

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import vllm
import vllm_torch
from reader_check import Reference, Report, max_difference, run, tokenizer_agrees


def check(report: Report, checkpoint: Path, reference: Reference, options: dict[str, Any]) -> Report:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    vllm_torch.install(config["model_type"])
    vocabulary = reference.logits.shape[-1]
    engine = vllm.LLM(
        model=str(checkpoint),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        max_logprobs=-1,
        logprobs_mode="raw_logprobs",
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )
    sampling = vllm.SamplingParams(
        max_tokens=reference.greedy.shape[1],
        temperature=0.0,
        ignore_eos=True,
        prompt_logprobs=vocabulary,
        logprobs=vocabulary,
        detokenize=False,
    )
    prompts = [vllm.TokensPrompt(prompt_token_ids=row) for row in reference.input_ids.tolist()]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    greedy = [list(output.outputs[0].token_ids) for output in outputs]
    return replace(
        report,
        loaded=True,
        max_abs_logprob_difference=max_difference(_pairs(outputs, reference)),
        greedy=greedy,
        greedy_equal=greedy == reference.greedy.tolist(),
        tokenizer_equal=tokenizer_agrees(checkpoint, reference),
    )


def _pairs(outputs: list[vllm.RequestOutput], reference: Reference) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """vLLM's log-probabilities at every prompt position and at the first generated one, beside the reference's."""
    for output, want in zip(outputs, reference.log_probabilities(), strict=True):
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        for row, wanted in zip(rows, want, strict=True):
            yield _dense(row, len(wanted)), wanted


def _dense(row: Mapping[int, vllm.logprobs.Logprob], vocabulary: int) -> np.ndarray:
    """F64 [V]; NaN where vLLM gave no value, which the comparison counts as a failure."""
    dense = np.full(vocabulary, np.nan)
    for token, entry in row.items():
        dense[token] = entry.logprob
    return dense


if __name__ == "__main__":
    sys.exit(run(Report("vllm", vllm.__version__), check))
