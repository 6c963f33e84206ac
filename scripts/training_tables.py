"""The tables of docs/performance.md from `benchmarks/results/training-*.json`, for `performance_tables.py`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TITLES = {
    "ours": "this project",
    "ours-without-graphs": "this project, without CUDA graphs",
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


def read(name: str) -> Document:
    """One file of the results."""
    document: Document = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return document


def training(document: Document) -> str:
    """The table and plots of one `training-*.json`, with what our step spends its time on."""
    made, rows = document["configuration"], document["rows"]
    lines = [
        f"**{made['case']}**: {made['config']['num_hidden_layers']} layers, {made['gpus']} x {made['gpu']}, sequence "
        f"{made['sequence']:,}, {tokens(made)} tokens, torch {made['torch']}, transformers {made['transformers']}; "
        f"medians of {made['steps']} steps{', in a row' if in_a_row(made) else ', each begun on an idle device'}; "
        f"{made['flops_per_token'] / 1e9:.2f} GFLOP a token.",
        "",
        "| | micro-batch | ms | tokens/s/GPU | x transformers | TFLOP/s | GiB | loss, first and last common step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    timed = [row for row in rows if "error" not in row]
    base: dict[int, float] = {}
    for row in sorted(timed, key=lambda row: (row["implementation"], bool(row.get("checkpointing")))):
        if row["implementation"].startswith("transformers"):
            base.setdefault(row["micro_batch"], row["seconds"])
    common = {
        row["micro_batch"]: min(len(r["losses"]) for r in timed if r["micro_batch"] == row["micro_batch"])
        for row in timed
    }
    for row in sorted(timed, key=lambda row: row["micro_batch"]):
        size, seconds = row["micro_batch"], row["seconds"]
        ratio = f"{base[size] / seconds:.2f}" if size in base else ""
        used = f" ({row['mfu']:.1%})" if row.get("mfu") else ""
        lines.append(
            f"| {title(row, made['gpus'])} | {size} | {seconds * 1e3:.1f} | {row['tokens_per_second_per_gpu']:,} "
            f"| {ratio} | {row['model_tflops']:.0f}{used} | {row['peak_gib']} "
            f"| {row['losses'][0]:.3f}, {row['losses'][common[size] - 1]:.3f} |"
        )
    for row in rows:
        if "error" in row:
            size = f" {row['micro_batch']}" if "micro_batch" in row else ""
            lines.append(f"| {title(row, made['gpus'])} |{size} | {row['error'][:80]} | | | | | |")
    for row in rows:
        if row["implementation"] == "ours" and "kernels" in row:
            spent = row["kernels"]["milliseconds_by_kind"].items()
            shares = ", ".join(f"{kind} {value:.1f}" for kind, value in sorted(spent, key=lambda kind: -kind[1]))
            bare = row["kernels"].get("exposed_communication")
            alone = "" if bare is None else f"; communication that nothing else covers {bare:.1f}"
            size = f"{row['micro_batch']}{checkpointing(row)}"
            lines += ["", f"Ours at micro-batch {size}, milliseconds in kernels: {shares}{alone}."]
    plots = [f"![Tokens a second at micro-batch {size}](plots/{plot_name(made, size)})" for size in compared(timed)]
    return "\n".join([*lines, *(["", *plots] if plots else [])]) + "\n"


def summary() -> str:
    """One line for each size that this project and another one were timed at."""
    peers = {
        "grouped_mm": ("transformers",),
        "compiled": ("transformers-compiled", "transformers-flex-compiled"),
        "NeMo AutoModel": ("nemo",),
        "Liger": ("liger",),
    }
    titles = (
        "",
        "GPUs",
        "tokens",
        "steps",
        "micro-batch",
        "tokens/s/GPU",
        *(f"x {name}" for name in peers),
        "GiB",
        "grouped_mm's",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    runs = list(training_runs())
    for run in runs:
        made, rows = run["configuration"], [row for row in _with_peers(run, runs) if "error" not in row]
        ours = [row for row in rows if row["implementation"] == "ours" and not row.get("checkpointing")]
        sizes = {row["micro_batch"] for row in ours}
        for mine in sorted(ours, key=lambda row: row["micro_batch"]):
            beside = [
                _beside(mine, sizes, [r for r in rows if r["implementation"] in kinds]) for kinds in peers.values()
            ]
            if not any(beside):
                continue
            where = made["case"], made["gpus"], tokens(made), "in a row" if in_a_row(made) else "one by one"
            speed = mine["micro_batch"], f"{mine['tokens_per_second_per_gpu']:,}"
            memory = mine["peak_gib"], beside[0]["peak_gib"] if beside[0] else ""
            cells = *where, *speed, *(_ratio(mine, other) for other in beside), *memory
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def _with_peers(run: Document, runs: list[Document]) -> list[Document]:
    """The rows of a run; where only ours were timed at its pace, with the others' of the same case at the other."""
    rows: list[Document] = run["rows"]
    if any(not row["implementation"].startswith("ours") for row in rows):
        return rows
    same = [other for other in runs if other is not run and _case(other) == _case(run)]
    return [*rows, *(row for o in same for row in o["rows"] if not row["implementation"].startswith("ours"))]


def _case(run: Document) -> tuple[str, int, str]:
    made = run["configuration"]
    return made["case"], made["gpus"], tokens(made)


def _beside(mine: Document, sizes: set[int], others: list[Document]) -> Document | None:
    """The fastest row of the same size; without one, of those sizes that were chosen for the other's sake."""
    same = [row for row in others if row["micro_batch"] == mine["micro_batch"]]
    chosen = [row for row in others if row["micro_batch"] not in sizes]
    return max(same or chosen, key=lambda row: row["tokens_per_second_per_gpu"], default=None)


def _ratio(mine: Document, other: Document | None) -> str:
    if other is None:
        return ""
    ratio = mine["tokens_per_second_per_gpu"] / other["tokens_per_second_per_gpu"]
    differs = other["micro_batch"] != mine["micro_batch"]
    return f"{ratio:.2f}" + (f" (at {other['micro_batch']})" if differs else "")


def compared(rows: list[Document]) -> list[int]:
    """Micro-batch sizes that several rows were timed at."""
    counts = Counter(row["micro_batch"] for row in rows)
    return sorted(size for size, count in counts.items() if count > 1)


def tokens(made: Document) -> str:
    """How often each token of the vocabulary comes in the batches of a run."""
    return str(made.get("tokens", "skewed"))


def in_a_row(made: Document) -> bool:
    """Whether steps followed each other without a pause; older runs began each on an idle device."""
    return "timing" in made


def plot_name(made: Document, size: int) -> str:
    """The plot of one micro-batch size of a run."""
    pace = "-in-a-row" if in_a_row(made) else ""
    return f"training-{made['case']}-{made['gpus']}gpu-{tokens(made)}{pace}-{size}.svg"


def title(row: Document, gpus: int) -> str:
    """Who ran, and how: experts are divided over all processes unless it is said."""
    divided = f", ep {row['ep']}" if row["implementation"].startswith("ours") and row.get("ep", gpus) != gpus else ""
    return TITLES[row["implementation"]] + divided + checkpointing(row)


def checkpointing(row: Document) -> str:
    """What a row says of it after its name."""
    selective = "selective " if row.get("checkpointing") == "selective" else ""
    return f", {selective}activation checkpointing" if row.get("checkpointing") else ""


def training_runs() -> Iterator[Document]:
    """Runs of one case on as many GPUs, like tokens and at one pace as one document; the first one's configuration."""
    found: dict[tuple[str, int, str, bool], Document] = {}
    for path in sorted(RESULTS.glob("training-*.json")):
        document = read(path.name)
        made = document["configuration"]
        key = made["case"], made["gpus"], tokens(made), in_a_row(made)
        first = found.setdefault(key, {"configuration": made, "rows": []})
        first["rows"] = [*first["rows"], *document["rows"]]
    yield from found.values()
