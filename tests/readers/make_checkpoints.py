"""Write tiny checkpoints of every native family with this environment's stock transformers, and their references.

Usage: python make_checkpoints.py DESTINATION [CASE ...]; makes DESTINATION/CASE/ (save_pretrained) and
DESTINATION/CASE.reference.safetensors. Sizes respect what vLLM's CPU kernels take (head_dim 32, expert width a multiple
of 32). Every tensor is random, norms and biases too: a reader that leaves one at its initial value is found out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from cases import CASES, FORMS, VOCABULARY
from published_forms import publish
from reader_check import Reference
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PROMPTS, PROMPT_LENGTH, GENERATED = 3, 24, 6
CLEAR_LEAD = 1e-3
"""Logit lead that the greedy token must have over the second, so that rounding cannot change a reader's answer."""
TEXT = Path(__file__).parents[2] / "examples/demo/data/pride_and_prejudice.txt"


def make(case: str, destination: Path) -> None:
    """Write one case's checkpoint, tokenizer and reference under `destination`."""
    config = transformers.AutoConfig.for_model(**CASES[case])
    tokenizer = _tokenizer()
    for seed in range(20):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        _randomise(model)
        if form := FORMS.get(case):
            model = _published(model, form, destination / case)
        if reference := _reference(model, tokenizer):
            break
    else:
        raise RuntimeError(f"{case}: no seed gave greedy tokens with a lead of {CLEAR_LEAD}")
    if case not in FORMS:
        model.save_pretrained(destination / case)
    _save_tokenizer(tokenizer, destination / case)
    reference.save(destination / f"{case}.reference.safetensors")


def _published(model: transformers.PreTrainedModel, form: str, destination: Path) -> transformers.PreTrainedModel:
    """Publish a model in a quantised form; what is returned has the values that were published."""
    shutil.rmtree(destination, ignore_errors=True)
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain)
        publish(Path(plain), destination, form)
        return type(model).from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()


def _randomise(model: transformers.PreTrainedModel) -> None:
    """Give norms and biases, which start as ones and zeros, values of their own; routers' correction biases, too."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("bias"):
                tensor.normal_(std=0.3)
            elif tensor.ndim == 1:
                # Norms that hold their weight less 1 start as zeros.
                tensor.add_(torch.empty_like(tensor).uniform_(-0.5, 0.5))
            if name.endswith("sinks"):  # published in BF16, and kept so by SGLang whatever it computes in
                tensor.copy_(tensor.bfloat16())


def _reference(model: transformers.PreTrainedModel, tokenizer: Tokenizer) -> Reference | None:
    """The model's own answers, or None when a greedy choice is too close to call."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, VOCABULARY, (PROMPTS, PROMPT_LENGTH), generator=generator)
    with torch.no_grad():
        tokens = prompts
        for _ in range(GENERATED):
            logits = model(tokens).logits
            best, second = logits[:, -1].topk(2).values.unbind(-1)
            if (best - second).min() < CLEAR_LEAD:
                return None
            tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=-1)
        logits = model(prompts).logits
    text = TEXT.read_text(encoding="utf-8")[:400]
    return Reference(
        input_ids=prompts.numpy(),
        logits=logits.numpy(),
        greedy=tokens[:, PROMPT_LENGTH:].numpy(),
        text=text,
        text_ids=tokenizer.encode(text).ids,
    )


def _tokenizer() -> Tokenizer:
    """A byte-level BPE of VOCABULARY tokens trained on the demo's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, destination: Path) -> None:
    """The two files as the hub has them; transformers 5 would name a class that transformers 4 does not know."""
    tokenizer.save(str(destination / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, **special}
    (destination / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _lines() -> Iterator[str]:
    with TEXT.open(encoding="utf-8") as file:
        yield from file


def main() -> int:
    parser = argparse.ArgumentParser(description="Write tiny checkpoints with stock transformers, and references.")
    parser.add_argument("destination", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all when none is named")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.cases) - set(CASES)):
        parser.error(f"no such case: {', '.join(unknown)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for case in arguments.cases or CASES:
        make(case, arguments.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
