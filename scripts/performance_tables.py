"""Renders the tables of docs/performance.md from what was measured, benchmarks/results/.

`python scripts/performance_tables.py` rewrites them between their markers; `--check` says whether they are current.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from training_tables import RESULTS, Document, read, summary, training, training_runs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"


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
    parts += [full_model(read(path.name)) for path in sorted(RESULTS.glob("full-model-*.json"))]
    parts += [experts(read(path.name)) for path in sorted(RESULTS.glob("experts*.json"))]
    return "\n".join([*parts, dispatch(read("dispatch.json")), transformer_engine(read("te.json"))])


SECTIONS: dict[str, Callable[[], str]] = {
    "checkpoints": lambda: checkpoints(read("checkpoints-warm.json"), read("checkpoints-cold.json")),
    "peers": lambda: peers(read("checkpoints-peers-warm.json"), read("checkpoints-peers-cold.json")),
    "sharing": lambda: sharing(read("sharing.json")),
    "planning": lambda: planning(read("planning.json")),
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
