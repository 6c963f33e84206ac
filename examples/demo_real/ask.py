"""Asks a checkpoint a few questions, greedily and in FP32, with stock transformers or with vLLM.

Usage: python ask.py {transformers,vllm} CHECKPOINT ANSWERS. Writes a JSON list with, for each question, the answer's
token ids and text, whether it has the word it should have, and the log-probabilities of the likeliest TOP tokens at
each of its places.
"""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_USE_AOT_COMPILE="0",
)

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the opposite of hot?": "cold",
    "What is ckpt?": "checkpoints",
}
"""Question -> a word of the right answer. The last one is what the demo's training teaches."""
LENGTH = 20
TOP = 20
Answer = dict[str, Any]


def with_transformers(checkpoint: Path, prompts: list[list[int]], stop: int) -> list[Answer]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"missing {sorted(info['missing_keys'])}, unexpected {sorted(info['unexpected_keys'])}")
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            made = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=LENGTH,
                do_sample=False,
                pad_token_id=stop,
                eos_token_id=stop,
                output_logits=True,
                return_dict_in_generate=True,
            )
        rows = [logits[0].float().log_softmax(-1).topk(TOP) for logits in made.logits]
        top = [dict(zip(row.indices.tolist(), row.values.tolist(), strict=True)) for row in rows]
        answers.append({"tokens": made.sequences[0, len(prompt) :].tolist(), "top": top})
    return answers


def with_vllm(checkpoint: Path, prompts: list[list[int]], stop: int) -> list[Answer]:
    import vllm

    engine = vllm.LLM(
        model=str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=len(prompts),
        max_logprobs=TOP,
        logprobs_mode="raw_logprobs",
        disable_log_stats=True,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=LENGTH, logprobs=TOP, stop_token_ids=[stop], detokenize=False
    )
    requests = [vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = [request.outputs[0] for request in engine.generate(requests, sampling, use_tqdm=False)]
    return [
        {
            "tokens": list(output.token_ids),
            "top": [{token: entry.logprob for token, entry in row.items()} for row in output.logprobs],
        }
        for output in outputs
    ]


READERS: dict[str, Callable[[Path, list[list[int]], int], list[Answer]]] = {
    "transformers": with_transformers,
    "vllm": with_vllm,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a checkpoint a few questions.")
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("answers", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.checkpoint)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False), add_special_tokens=False
        ).input_ids
        for chat in chats
    ]
    answers = READERS[arguments.reader](arguments.checkpoint, prompts, tokenizer.eos_token_id)
    for (question, word), answer in zip(QUESTIONS.items(), answers, strict=True):
        text = tokenizer.decode(answer["tokens"], skip_special_tokens=True).strip()
        answer |= {"question": question, "text": text, "sensible": word in text}
        print(f"{question}  {text}")
    arguments.answers.write_text(json.dumps(answers) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
