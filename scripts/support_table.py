"""Renders the README's support table from docs/readers.json, the matrix that `make readers` measured.

`python scripts/support_table.py` rewrites the table between its two markers; `--check` only says whether it is current.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- support-table:begin (make readers) -->", "<!-- support-table:end -->"
TITLES = {
    "transformers4": "transformers 4",
    "transformers5": "transformers 5",
    "vllm": "vLLM",
    "sglang": "SGLang",
}
CASES = {
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_moe-tied": "Qwen3-MoE, tied embeddings",
    "qwen3_moe-raw_weights": "Qwen3-MoE, `norm_topk_prob: false`",
    "qwen3_moe-dense_layers": "Qwen3-MoE, `mlp_only_layers` and `decoder_sparse_step`",
    "qwen3_moe-fp8": "Qwen3-MoE, FP8 in 128x128 blocks",
    "qwen3_moe-fp8-export": "Qwen3-MoE, dequantised from FP8",
    "qwen3_moe-fp8-narrow": "Qwen3-MoE, FP8, keys and values in part of a block",
    "gpt_oss": "GPT-OSS",
    "gpt_oss-mxfp4": "GPT-OSS, MXFP4",
    "gpt_oss-mxfp4-export": "GPT-OSS, dequantised from MXFP4",
    "deepseek_v3": "DeepSeek V3",
    "deepseek_v3-moonlight": "DeepSeek V3 as Moonlight has it (no `q_lora_rank`, no YaRN)",
    "deepseek_v3-fp8": "DeepSeek V3, FP8 in 128x128 blocks",
    "deepseek_v3-fp8-export": "DeepSeek V3, dequantised from FP8",
    "nemotron_h": "Nemotron-H",
    "nemotron_h-moe": "Nemotron-H with experts",
    "nemotron_h-latent_moe": "Nemotron-H with latent experts",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_moe": "Qwen3.5-MoE, text model",
    "mixtral": "Mixtral",
    "mixtral-head_dim": "Mixtral, `head_dim` of its own",
    "glm4_moe": "GLM-4.5",
    "minimax_m2": "MiniMax-M2",
    "olmoe": "OLMoE",
    "llama4_text": "Llama 4 (text)",
    "gemma3_text": "Gemma 3 (text)",
    "qwen3": "Qwen3",
    "qwen2": "Qwen2",
    "qwen2-tied": "Qwen2, tied embeddings",
    "llama": "Llama",
    "llama-tied-rope_scaling": "Llama, tied embeddings, Llama 3 RoPE scaling",
    "llama-biases": "Llama, attention and MLP biases",
}
Cells = list[dict[str, Any]]


def render(document: dict[str, Any]) -> str:
    """The Markdown table: a row a checkpoint, a column a reader, each cell what was proven, with footnotes."""
    cells: Cells = document["cells"]
    readers = [reader for reader in TITLES if any(cell["reader"] == reader for cell in cells)]
    notes: list[str] = []
    versions = {cell["reader"]: cell["version"] for cell in cells if cell["version"]}
    heads = [f"{TITLES[reader].split()[0]} {versions[reader]}" for reader in readers]
    lines = [f"| checkpoint | {' | '.join(heads)} |", f"|---|{'---|' * len(readers)}"]
    for case, title in CASES.items():
        row = [[cell for cell in cells if (cell["case"], cell["reader"]) == (case, reader)] for reader in readers]
        lines.append(f"| {title} | {' | '.join(_cell(found, notes) for found in row)} |")
    numbered = [f"{index}. {note}." for index, note in enumerate(notes, start=1)]
    return "\n".join([*lines, "", *numbered]).rstrip() + "\n"


def _cell(found: Cells, notes: list[str]) -> str:
    """What was proven; what has to be said with it goes to `notes`."""
    if not found:
        return "not run"
    first = found[0]
    if first["limit"]:
        remedy = f"; {first['note']}" if first["note"] else ""
        return "reader's limit" + _footnote(f"{first['limit']}, in the stock checkpoint too{remedy}", notes)
    if not all(cell["passed"] for cell in found):
        return "**differs**"
    if first["proof"] == "values":
        return "✓ values" + _footnote(f"{first['note']}: ours equal the source's files byte for byte", notes)
    worst = max(cell["max_abs_logprob_difference"] for cell in found)
    return (f"✓ {worst:.0e}" if worst else "✓ exact") + _footnote(first["note"], notes)


def _footnote(note: str | None, notes: list[str]) -> str:
    if note is None:
        return ""
    note = note[:1].upper() + note[1:] if note.startswith("with ") else note
    if note not in notes:
        notes.append(note)
    return f" ({notes.index(note) + 1})"


def main() -> int:
    parser = argparse.ArgumentParser(description="Render the README's support table from docs/readers.json.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the table is not current")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--matrix", type=Path, default=ROOT / "docs" / "readers.json")
    arguments = parser.parse_args()
    text = arguments.readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(f"{arguments.readme} lacks the markers {BEGIN} and {END}", file=sys.stderr)
        return 1
    table = render(json.loads(arguments.matrix.read_text(encoding="utf-8")))
    current = f"{before}{BEGIN}\n{table}{END}{after}"
    if current == text:
        return 0
    if arguments.check:
        print("The support table is not what docs/readers.json says. hint: scripts/support_table.py", file=sys.stderr)
        return 1
    arguments.readme.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
