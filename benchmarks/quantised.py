"""Dequantising and quantising against plain copies of the same values and against `cp`, interleaved in one run.

    python benchmarks/quantised.py --rounds 5 --mode warm --data bench-data --json quantised-warm.json

A repository shaped like Qwen3-MoE (1.3 GB in BF16) and one like GPT-OSS (1.3 GB) are made once, with their native and
quantised forms. Every round runs each job once, in the same order, as `benchmarks/checkpoints.py` does. Ratios are of
BF16 bytes per second, which `convert` writes and `consolidate` reads: those of the job over those of the plain job of
Qwen3-MoE in the same round, medians over rounds (GPT-OSS's own plain form is transposed, which is more than copying).
Quantising reads back what it wrote until a value of a segment differs; that is part of its time. GPT-OSS's values here
are those of its MXFP4 form, which come back bit for bit, so there it reads back everything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from checkpoint_data import CONFIG, GPT_OSS, make_source
from checkpoints import Job, Run, bare_interpreter, empty_cache, fill_cache, measure

SHAPES = {"qwen3_moe": (CONFIG, 4, ("fp8", "fp8-channel")), "gpt_oss": (GPT_OSS, 6, ("mxfp4",))}
CKPT = [sys.executable, "-m", "ckpt_tools"]


def run_once(path: Path, *command: str) -> None:
    """Makes a directory with a command of `ckpt`, unless it is there."""
    if not path.exists():
        subprocess.run([*CKPT, *command, str(path), "--quiet"], check=True)


def jobs(data: Path) -> list[tuple[Job, str, int]]:
    """(job, plain job that it is compared with, BF16 bytes) in the order of a round; inputs are made where needed."""
    found: list[tuple[Job, str, int]] = []
    for family, (config, layers, forms) in SHAPES.items():
        plain = make_source(data, layers, config, family)
        native = data / f"{plain.name}-native"
        run_once(native, "convert", str(plain))
        size = sum(file.stat().st_size for file in plain.glob("*.safetensors"))
        if config is CONFIG:
            copy = ["cp", "-r", "--reflink=never", str(plain), "{out}"]
            found.append((Job("cp", plain, copy), "convert", size))
            found.append((Job("convert", plain, [*CKPT, "convert", str(plain), "{out}", "--quiet"]), "convert", size))
            command = [*CKPT, "consolidate", str(native), "{out}", "--quiet"]
            found.append((Job("consolidate", native, command), "consolidate", size))
        for form in forms:
            source = data / f"{plain.name}-{form}"
            if not source.exists():
                command = [*CKPT, "consolidate", str(native), str(source), "--quantize", form, "--quiet"]
                subprocess.run(command, check=True)
            command = [*CKPT, "convert", str(source), "{out}", "--dequantize", "--quiet"]
            found.append((Job(f"convert --dequantize, {form}", source, command), "convert", size))
            command = [*CKPT, "consolidate", str(native), "{out}", "--quantize", form, "--quiet"]
            found.append((Job(f"consolidate --quantize {form}", native, command), "consolidate", size))
    return found


def main() -> None:
    """Parses the command line, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", choices=("cold", "warm"), default="warm")
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data: Path = arguments.data.absolute()
    data.mkdir(parents=True, exist_ok=True)
    prepare = (lambda _: empty_cache()) if arguments.mode == "cold" else fill_cache
    todo = jobs(data)
    runs: dict[str, list[Run]] = {job.name: [] for job, _, _ in todo}
    for number in range(arguments.rounds):
        for job, _, _ in todo:
            runs[job.name].append(measure(job, data / "out", prepare))
            print(f"round {number + 1} {job.name:46} {runs[job.name][-1].seconds:6.2f} s", file=sys.stderr, flush=True)
    shutil.rmtree(data / "out", ignore_errors=True)
    report(runs, {job.name: plain for job, plain, _ in todo}, {job.name: size for job, _, size in todo}, arguments)


def report(
    runs: dict[str, list[Run]], plain: dict[str, str], sizes: dict[str, int], arguments: argparse.Namespace
) -> None:
    """Prints medians and ratios, and writes every run to the JSON file."""
    bare = bare_interpreter()
    print(f"{arguments.mode}, {arguments.rounds} rounds, {os.cpu_count()} cores")
    print(f"{'job':46} {'s':>6} {'x plain':>8} {'CPU s':>6} {'CPU x plain':>12} {'peak MB over Python':>20}")
    rows = []
    for name, measured in runs.items():
        pairs = list(zip(runs[plain[name]], measured, strict=True))
        scale = sizes[name] / sizes[plain[name]]
        row = {
            "job": name,
            "seconds": statistics.median(r.seconds for r in measured),
            "bytes": sizes[name],
            "ratio_to_plain": scale * statistics.median(p.seconds / r.seconds for p, r in pairs),
            "cpu_seconds": statistics.median(r.cpu_seconds for r in measured),
            "cpu_ratio_to_plain": scale * statistics.median(p.cpu_seconds / r.cpu_seconds for p, r in pairs),
            "peak_mb_over_python": max(0, max(r.peak_bytes for r in measured) - bare) / 1e6,
            "runs": [asdict(r) for r in measured],
        }
        rows.append(row)
        print(
            f"{name:46} {row['seconds']:6.2f} {row['ratio_to_plain']:8.2f} {row['cpu_seconds']:6.2f} "
            f"{row['cpu_ratio_to_plain']:12.2f} {row['peak_mb_over_python']:20.0f}"
        )
    if arguments.json:
        machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
        configuration = {"mode": arguments.mode, "rounds": arguments.rounds, "machine": machine}
        arguments.json.write_text(json.dumps({"configuration": configuration, "jobs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
