"""Renders the tables of docs/performance.md that come from GPU runs in benchmarks/results/.

`python scripts/performance_tables.py` rewrites them between their markers; `--check` says whether they are current.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- gpu-tables:begin (scripts/performance_tables.py) -->", "<!-- gpu-tables:end -->"
TITLES = {
    "ours": "this project",
    "ours-all_to_all": "this project, experts through all-to-all",
    "transformers": "transformers, grouped_mm",
    "transformers-compiled": "transformers, grouped_mm, layers compiled",
    "transformers-eager": "transformers, eager experts",
    "transformers-flex-compiled": "transformers, grouped_mm, FlexAttention, layers compiled",
    "liger": "transformers, grouped_mm, Liger",
    "liger-compiled": "transformers, grouped_mm, Liger, layers compiled",
    "nemo": "NeMo AutoModel",
}
Document = dict[str, Any]


def training(document: Document) -> str:
    """The table of one `training-*.json`, with what our step spends its time on."""
    made, rows = document["configuration"], document["rows"]
    lines = [
        f"**{made['case']}**: {made['config']['num_hidden_layers']} layers, {made['gpus']} x {made['gpu']}, sequence "
        f"{made['sequence']:,}, torch {made['torch']}, transformers {made['transformers']}; medians of "
        f"{made['steps']} steps; {made['flops_per_token'] / 1e9:.2f} GFLOP a token.",
        "",
        "| | micro-batch | ms | tokens/s/GPU | x transformers | TFLOP/s | GiB | loss, first and last step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = {row["micro_batch"]: row["seconds"] for row in rows if row["implementation"] == "transformers"}
    for row in sorted((row for row in rows if "error" not in row), key=lambda row: row["micro_batch"]):
        size, seconds = row["micro_batch"], row["seconds"]
        title = TITLES[row["implementation"]] + (", activation checkpointing" if row.get("checkpointing") else "")
        ratio = f"{base[size] / seconds:.2f}" if size in base else ""
        lines.append(
            f"| {title} | {size} | {seconds * 1e3:.1f} | {row['tokens_per_second_per_gpu']:,} "
            f"| {ratio} | {row['model_tflops']:.0f} | {row['peak_gib']} "
            f"| {row['losses'][0]:.3f}, {row['losses'][-1]:.3f} |"
        )
    lines += [
        f"| {TITLES[row['implementation']]} | | {row['error'][:80]} | | | | | |" for row in rows if "error" in row
    ]
    for row in rows:
        if row["implementation"] == "ours" and "kernels" in row:
            spent = row["kernels"]["milliseconds_by_kind"].items()
            shares = ", ".join(f"{kind} {value:.1f}" for kind, value in sorted(spent, key=lambda kind: -kind[1]))
            lines += ["", f"Ours at micro-batch {row['micro_batch']}, milliseconds in kernels: {shares}."]
    return "\n".join(lines) + "\n"


def experts(document: Document) -> str:
    """The table of `experts.json`."""
    shape = document["shape"]
    lines = [
        f"**One expert block**, {document['gpu']}: hidden {shape['hidden']}, {shape['experts']} experts of width "
        f"{shape['width']}, top {shape['top_k']}, uneven load; the share is of a matrix product's "
        f"{document['matmul_tflops']:.0f} TFLOP/s in the same process.",
        "",
        "| | tokens | forward ms | forward and backward ms | share | saved for backward GB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['implementation']} | {row['tokens']:,} | {row['forward_ms']:.2f} | {row['forward_backward_ms']:.2f} "
        f"| {row['share_of_matmul']:.2f} | {row['saved_gb']:.2f} |"
        for row in document["rows"]
    ]
    return "\n".join(lines) + "\n"


def dispatch(document: Document) -> str:
    """The table of `dispatch.json`."""
    shape = document["shape"]
    lines = [
        f"**One expert block over {document['gpus']} x {document['gpu']}**: hidden {shape['hidden']}, "
        f"{shape['experts']} experts of width {shape['width']}, top {shape['top_k']}, uneven load.",
        "",
        "| dispatch | tokens/GPU | forward ms | forward and backward ms | host ms | peak GB | in kernels, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in row["kernels_ms"].items() if value)
        lines.append(
            f"| {row['dispatch']} | {row['tokens']:,} | {row['forward_ms']:.2f} | {row['forward_backward_ms']:.2f} "
            f"| {row['host_ms']:.2f} | {row['peak_gb']:.2f} | {kinds} |"
        )
    return "\n".join(lines) + "\n"


def transformer_engine(document: Document) -> str:
    """The table of `te.json`."""
    cudnn = ".".join(str(part) for part in document["cudnn"])
    lines = [
        f"**TransformerEngine's kernels and others**, {document['gpu']}: forward and backward, torch "
        f"{document['torch']}, TransformerEngine {document['transformer_engine']}, cuDNN {cudnn}.",
        "",
        "| | kernel | ms | ms in a CUDA graph | error of the output | of the gradients |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        if "error" in row:
            lines.append(f"| {row['case']} | {row['kernel']} | {row['error'][:80]} | | | |")
            continue
        graph = f"{row['graph_ms']:.3f}" if row["graph_ms"] else "not possible"
        lines.append(
            f"| {row['case']} | {row['kernel']} | {row['ms']:.3f} | {graph} "
            f"| {row['output_error']:.1e} | {row['gradient_error']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def render(results: Path) -> str:
    """All tables, in the order of their files."""
    parts = [training(_read(path)) for path in sorted(results.glob("training-*.json"))]
    parts += [experts(_read(path)) for path in sorted(results.glob("experts.json"))]
    parts += [dispatch(_read(path)) for path in sorted(results.glob("dispatch.json"))]
    parts += [transformer_engine(_read(path)) for path in sorted(results.glob("te.json"))]
    return "\n".join(parts)


def _read(path: Path) -> Document:
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description="Render the GPU tables of docs/performance.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the tables are not current")
    arguments = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(f"{PAGE} lacks the markers {BEGIN} and {END}", file=sys.stderr)
        return 1
    current = f"{before}{BEGIN}\n{render(RESULTS)}{END}{after}"
    if current == text:
        return 0
    if arguments.check:
        print("docs/performance.md is not what the results say. hint: scripts/performance_tables.py", file=sys.stderr)
        return 1
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
