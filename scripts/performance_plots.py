"""Draws the plots of docs/performance.md from what was measured, benchmarks/results/: bars, as SVG.

`python scripts/performance_plots.py` rewrites docs/plots/; `--check` says whether they are current.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

from training_tables import compared, plot_name, read, title, tokens, training_runs

ROOT = Path(__file__).parents[1]
PLOTS = ROOT / "docs" / "plots"
LABELS, BARS, ROW = 380, 380, 22
"""Pixels: width of the labels, of the longest bar, height of a row."""


class Bar(NamedTuple):
    """One bar: its label, its length, and whether it is ours."""

    label: str
    value: float
    ours: bool


def plot(title: str, unit: str, bars: list[Bar]) -> str:
    """Horizontal bars, the longest of full width, each with its value. Legible on white and on black."""
    longest = max(bar.value for bar in bars)
    height = ROW * (len(bars) + 2)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABELS + BARS + 90}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#808080">',
        f'<text x="0" y="15" font-size="13" font-weight="bold">{escape(title)}</text>',
    ]
    for number, bar in enumerate(bars, start=1):
        top, width = ROW * number + 4, max(1, round(BARS * bar.value / longest))
        color = "#2f81f7" if bar.ours else "#9a9a9a"
        lines += [
            f'<text x="{LABELS - 8}" y="{top + 13}" text-anchor="end">{escape(bar.label)}</text>',
            f'<rect x="{LABELS}" y="{top}" width="{width}" height="{ROW - 5}" fill="{color}"/>',
            f'<text x="{LABELS + width + 6}" y="{top + 13}">{bar.value:{",.0f" if bar.value >= 100 else ".2f"}}</text>',
        ]
    lines.append(f'<text x="{LABELS}" y="{height - 8}">{escape(unit)}</text></svg>')
    return "\n".join(lines) + "\n"


def plots() -> Iterator[tuple[str, str]]:
    """(file name, content) of every plot."""
    for state in ("warm", "cold"):
        rows = read(f"checkpoints-{state}.json")["jobs"]
        bars = [
            Bar(row["job"].removeprefix("peer: "), row["ratio_to_cp"], not row["job"].startswith(("cp", "peer: ")))
            for row in rows
        ]
        yield f"checkpoints-{state}.svg", plot(f"Checkpoints, {state} page cache", "times the speed of cp", bars)
    for document in training_runs():
        made, rows = document["configuration"], [row for row in document["rows"] if "error" not in row]
        case, gpus = made["case"], made["gpus"]
        for size in compared(rows):
            bars = [
                Bar(title(row, gpus), row["tokens_per_second_per_gpu"], row["implementation"].startswith("ours"))
                for row in rows
                if row["micro_batch"] == size
            ]
            what = f"{case}, {gpus} x {made['gpu']}, {tokens(made)} tokens, micro-batch {size}"
            yield plot_name(made, size), plot(what, "tokens a second and GPU", bars)


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the plots of docs/performance.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the plots are not current")
    wanted = dict(plots())
    found = {path.name: path.read_text(encoding="utf-8") for path in PLOTS.glob("*.svg")}
    if found == wanted:
        return 0
    if parser.parse_args().check:
        print("docs/plots/ is not what the results say. hint: scripts/performance_plots.py", file=sys.stderr)
        return 1
    PLOTS.mkdir(exist_ok=True)
    for name in found.keys() - wanted.keys():
        (PLOTS / name).unlink()
    for name, content in wanted.items():
        (PLOTS / name).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
