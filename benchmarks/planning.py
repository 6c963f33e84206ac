"""What planning and the verbs that look cost at the size of published models, from headers alone.

    python -m benchmarks.planning --data bench-data --json benchmarks/results/planning.json

Checkpoints with true headers and holes for tensors (`benchmarks/sparse.py`) are made once. Each verb runs in processes
of its own, interleaved over the rounds. Seconds and CPU seconds are medians of whole processes, start included; memory
is the largest peak resident size, the interpreter's included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

MESH = "dp_shard=8,ep=8"
EXPLAINED = "model.layers.5.mlp.experts.gate_up_proj"


@dataclass(frozen=True)
class Run:
    """One process: seconds, CPU seconds in user mode, peak resident bytes."""

    seconds: float
    user_seconds: float
    peak_bytes: int


def checkpoints(model: str, data: Path) -> dict[str, Path]:
    """The checkpoints of one model by a short name, made where they are not there yet."""
    found = {
        "FP8 repository": data / f"{model}-fp8",
        "BF16 repository": data / f"{model}-bf16",
        "DCP": data / f"{model}-dcp",
        "DCP of 64 ranks": data / f"{model}-dcp-64",
    }
    fp8, plain, whole, ranks = found.values()
    for arguments in (
        [str(fp8), "--form", "fp8"],
        [str(plain), "--max-file-size", "8.5GB", "--native", str(whole)],
        [str(plain), "--native", str(ranks), "--mesh", MESH],
    ):
        # In a process of its own: the peak of a process counts for those that it starts.
        subprocess.run([sys.executable, "-m", "benchmarks.sparse", model, *arguments], check=True)
    return found


def jobs(found: dict[str, Path]) -> dict[str, list[str]]:
    """Command lines by what they do."""
    fp8, plain, whole, ranks = map(str, found.values())
    commands = {
        "plan FP8 -> DCP": ["plan", fp8, "--dequantize"],
        f"plan FP8 -> DCP for {MESH}": ["plan", fp8, "--dequantize", "--mesh", MESH],
        "convert --dry-run FP8 -> DCP": ["convert", fp8, "nowhere", "--dequantize", "--dry-run"],
        "plan BF16 -> DCP": ["plan", plain],
        f"plan BF16 -> DCP for {MESH}": ["plan", plain, "--mesh", MESH],
        "plan DCP -> repository": ["plan", whole],
        "plan DCP of 64 ranks -> repository": ["plan", ranks],
        "plan DCP -> FP8 repository": ["plan", whole, "--quantize", "fp8"],
        "diff FP8, DCP": ["diff", fp8, whole],
    }
    for name, path in found.items():
        commands[f"inspect {name}"] = ["inspect", str(path)]
        commands[f"explain {name}"] = ["explain", str(path), EXPLAINED]
        commands[f"verify --no-digests {name}"] = ["verify", str(path), "--no-digests"]
    return commands


def measure(command: list[str]) -> Run:
    """Runs a verb once; `diff` may say that there are differences."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt_tools", *command, "--quiet"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    error = process.stderr.read().decode() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and command[0] != "diff":
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}:\n{error}")
    return Run(time.perf_counter() - started, usage.ru_utime, usage.ru_maxrss * 1024)


def main() -> None:
    """Parses the command line, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="DeepSeek-V3")
    parser.add_argument("--only", default="", help="jobs whose names hold this text")
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    todo = jobs(checkpoints(arguments.model, arguments.data.absolute()))
    todo = {name: command for name, command in todo.items() if arguments.only in name}
    runs: dict[str, list[Run]] = {name: [] for name in todo}
    for _ in range(arguments.rounds):
        for name, command in todo.items():
            runs[name].append(measure(command))
    print(f"{arguments.model}, {arguments.rounds} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'job':44} {'s':>6} {'user s':>7} {'peak MB':>8}")
    rows = []
    for name, measured in runs.items():
        row = {
            "job": name,
            "seconds": statistics.median(run.seconds for run in measured),
            "user_seconds": statistics.median(run.user_seconds for run in measured),
            "peak_mb": max(run.peak_bytes for run in measured) / 1e6,
            "runs": [asdict(run) for run in measured],
        }
        rows.append(row)
        print(f"{name:44} {row['seconds']:6.2f} {row['user_seconds']:7.2f} {row['peak_mb']:8.0f}")
    if arguments.json:
        machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
        configuration = {"model": arguments.model, "rounds": arguments.rounds, "machine": machine}
        arguments.json.write_text(json.dumps({"configuration": configuration, "jobs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
