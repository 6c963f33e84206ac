"""Renders the tables of docs/performance.md from what was measured, benchmarks/results/.

`python scripts/performance_tables.py` rewrites them between their markers; `--check` says whether they are current.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
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


def checkpoints(warm: Document, cold: Document) -> str:
    """The table of `checkpoints-warm.json` and `checkpoints-cold.json`."""
    lines = [
        "| job | warm s | x cp | CPU s | cold s | x cp | CPU s | peak MB over Python |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs = [{row["job"]: row for row in document["jobs"]} for document in (warm, cold)]
    for job in dict.fromkeys([*runs[0], *runs[1]]):
        found = [rows.get(job) for rows in runs]
        cells = [
            f"{row['seconds']:.2f} | {row['ratio_to_cp']:.2f} | {row['cpu_seconds']:.2f}" if row else " | | "
            for row in found
        ]
        peak = max(row["peak_mb_over_python"] for row in found if row)
        lines.append(f"| {job} | {' | '.join(cells)} | {peak:,.0f} |")
    return "\n".join(lines) + "\n"


def peers(warm: Document, cold: Document) -> str:
    """The table of `checkpoints-peers-warm.json` and `checkpoints-peers-cold.json`: other tools on the same files."""
    lines = [
        "| tool | warm s | x ours | CPU s | cold s | x ours | CPU s | peak MB over Python |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs = [{row["job"]: row for row in document["jobs"] if row["job"] != "cp"} for document in (warm, cold)]
    for job in sorted(dict.fromkeys([*runs[1], *runs[0]]), key=lambda job: job.startswith("peer")):
        found = [rows.get(job) for rows in runs]
        cells = [
            f"{row['seconds']:.1f} | {format(row['ratio_to_ours'], '.1f') if 'ours' in row else ''} "
            f"| {row['cpu_seconds']:.1f}"
            if row
            else " | | "
            for row in found
        ]
        title = job.removeprefix("peer: ") if job.startswith("peer") else f"**{job}**"
        lines.append(f"| {title} | {' | '.join(cells)} | {max(r['peak_mb_over_python'] for r in found if r):,.0f} |")
    return "\n".join(lines) + "\n"


def sharing(document: Document) -> str:
    """The table of `sharing.json`: XFS, then Btrfs in every cell."""
    lines = [
        "| job | process, s | x cp | call, s | x cp | placing, s | x cp | CPU s | shared | extra disk | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for pair in zip(document["xfs"], document["btrfs"], strict=True):

        def both(key: str, form: str, pair: tuple[Document, Document] = pair) -> str:
            return ", ".join(format(row[key], form) for row in pair)

        times = " | ".join(
            f"{both(f'{what}_seconds', '.2f')} | {both(f'{what}_seconds_ratio_to_cp', '.3g')}"
            for what in ("call", "placing")
        )
        lines.append(
            f"| {pair[0]['job']} | {both('seconds', '.2f')} | {both('seconds_ratio_to_cp', '.3g')} | {times} "
            f"| {both('cpu_seconds', '.1f')} | {pair[0]['shared_percent']:.1f} % "
            f"| {both('extra_disk_percent', '.2f')} % | {both('peak_mb_over_python', '.0f')} |"
        )
    return "\n".join(lines) + "\n"


def planning(document: Document) -> str:
    """The table of `planning.json`."""
    lines = ["| job | s | user s | peak MB |", "|---|---|---|---|"]
    lines += [
        f"| {row['job']} | {row['seconds']:.2f} | {row['user_seconds']:.2f} | {row['peak_mb']:.0f} |"
        for row in document["jobs"]
    ]
    return "\n".join(lines) + "\n"


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
    for run in training_runs():
        made, rows = run["configuration"], [row for row in run["rows"] if "error" not in row]
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


def full_model(document: Document) -> str:
    """The table of one `full-model-*.json`."""
    made = document["configuration"]
    lines = [
        f"**{made['case']}, from {made['gpus']} GPUs to a repository**, {made['cores']} cores, {made['file_system']}"
        f"{', with the optimizer' if made['optimizer'] else ''}:",
        "",
        "| | GB | s | GB/s |",
        "|---|---|---|---|",
    ]
    for row in document["rows"]:
        if "error" in row:
            lines.append(f"| {row['phase']} | {row['error'][:80]} | | |")
        else:
            lines.append(
                f"| {row['phase']} | {row.get('gb', '')} | {row['seconds']} | {row.get('gb_per_second', '')} |"
            )
    return "\n".join(lines) + "\n"


def experts(document: Document) -> str:
    """The table of `experts.json`, or of another model's `experts-*.json`."""
    shape = document["shape"]
    lines = [
        f"**One expert block of {document['model']}**, {document['gpu']}: hidden {shape['hidden']}, "
        f"{shape['experts']} experts of width {shape['width']}, top {shape['top_k']}, uneven load; the share is of a "
        f"matrix product's {document['matmul_tflops']:.0f} TFLOP/s in the same process.",
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
        if row["kind"] == "linear":
            continue
        graph = f"{row['graph_ms']:.3f}" if row["graph_ms"] else "not possible"
        lines.append(
            f"| {row['case']} | {row['kernel']} | {row['ms']:.3f} | {graph} "
            f"| {row['output_error']:.1e} | {row['gradient_error']:.1e} |"
        )
    return "\n".join([*lines, "", *_linear_layers(document["rows"])]) + "\n"


def _linear_layers(rows: list[Document]) -> Iterator[str]:
    """One line a size, one column a kernel; errors of the output and of the gradients once, which sizes hardly move."""
    kernels = ("torch", "te", "fp8", "te.Linear fp8", "fp8_block", "te.Linear fp8_block")
    cases: dict[str, dict[str, Document]] = {}
    for row in rows:
        if row["kind"] == "linear":
            cases.setdefault(row["case"].removeprefix("linear "), {})[row["kernel"]] = row
    worst = [max((case[k] for case in cases.values()), key=lambda row: row["gradient_error"]) for k in kernels]
    errors = [f"{row['output_error']:.1e}, {row['gradient_error']:.1e}" for row in worst]
    yield f"| linear layer, ms one by one, in a CUDA graph | {' | '.join(kernels)} |"
    yield "|" + "---|" * (1 + len(kernels))
    for case, by_kernel in cases.items():
        times = [f"{by_kernel[kernel]['ms']:.2f}, {by_kernel[kernel]['graph_ms']:.2f}" for kernel in kernels]
        yield f"| {case} | {' | '.join(times)} |"
    yield f"| errors of output, gradients | {' | '.join(errors)} |"


def gpu() -> str:
    """The tables of what was measured on GPUs."""
    parts = [training(run) for run in training_runs()]
    parts += [full_model(_read(path.name)) for path in sorted(RESULTS.glob("full-model-*.json"))]
    parts += [experts(_read(path.name)) for path in sorted(RESULTS.glob("experts*.json"))]
    return "\n".join([*parts, dispatch(_read("dispatch.json")), transformer_engine(_read("te.json"))])


def training_runs() -> Iterator[Document]:
    """Runs of one case on as many GPUs, like tokens and at one pace as one document; the first one's configuration."""
    found: dict[tuple[str, int, str, bool], Document] = {}
    for path in sorted(RESULTS.glob("training-*.json")):
        document = _read(path.name)
        made = document["configuration"]
        key = made["case"], made["gpus"], tokens(made), in_a_row(made)
        first = found.setdefault(key, {"configuration": made, "rows": []})
        first["rows"] = [*first["rows"], *document["rows"]]
    yield from found.values()


SECTIONS: dict[str, Callable[[], str]] = {
    "checkpoints": lambda: checkpoints(_read("checkpoints-warm.json"), _read("checkpoints-cold.json")),
    "peers": lambda: peers(_read("checkpoints-peers-warm.json"), _read("checkpoints-peers-cold.json")),
    "sharing": lambda: sharing(_read("sharing.json")),
    "planning": lambda: planning(_read("planning.json")),
    "summary": summary,
    "gpu": gpu,
}
"""What stands between the markers of each name."""


def render(text: str) -> str:
    """The page with every table as the results say.

    Raises:
        ValueError: the markers of a table are not there.
    """
    for name, table in SECTIONS.items():
        first, last = f"<!-- {name}-tables:begin (scripts/performance_tables.py) -->", f"<!-- {name}-tables:end -->"
        before, begin, rest = text.partition(first)
        _, end, after = rest.partition(last)
        if not (begin and end):
            raise ValueError(f"{PAGE} lacks the markers {first} and {last}")
        text = f"{before}{begin}\n{table()}{end}{after}"
    return text


def _read(name: str) -> Document:
    document: Document = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return document


def main() -> int:
    parser = argparse.ArgumentParser(description="Render the tables of docs/performance.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the tables are not current")
    arguments = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    current = render(text)
    if current == text:
        return 0
    if arguments.check:
        print("docs/performance.md is not what the results say. hint: scripts/performance_tables.py", file=sys.stderr)
        return 1
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
