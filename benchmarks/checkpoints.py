"""Convert and consolidate against `cp` of the same bytes and against other tools, interleaved in one run.

    python benchmarks/checkpoints.py --rounds 5 --mode cold --data bench-data --json benchmarks/results/checkpoints.json

A repository shaped like Qwen3-MoE (hidden 1024, 12 layers, 64 experts of width 768, vocabulary 32768: 3.886 GB in
2,415 tensors) and one with the widths of GPT-OSS-20B (one layer, 2.02 GB) are made once, and shards of the first as
torch writes them on 4 ranks. Every round runs each job once, in the same order; each starts from an empty output and,
in `cold` mode, from an empty page cache (needs root), and ends when the output is on the disk. Ratios are medians over
rounds of the time of cp of the same bytes divided by the job's in the same round. Memory is the peak resident size over
that of a bare Python. `--jobs REGEX` chooses; peers need the training extra.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from checkpoint_data import CONFIG, GPT_OSS_20B, make_sharded, make_source

MESH = "dp_shard=2,ep=2"
CKPT = [sys.executable, "-m", "ckpt_tools"]
PEERS = Path(__file__).with_name("checkpoint_peers.py")
LAUNCH = """
import json, os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(pid, 0)
with open(int(sys.argv[1]), "w") as out:
    json.dump([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024], out)
"""
"""Starts a job from a bare Python: the peak of a process counts that of the one it was spawned from."""


@dataclass
class Run:
    """One measured run of one job: seconds until the output is on disk, CPU seconds, peak resident bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass
class Job:
    """A command that reads `source` and makes `{out}`; `cp` names the job that copies the same bytes."""

    name: str
    source: Path
    command: list[str]
    cp: str = "cp"


def sync_tree(path: Path) -> None:
    """Returns when every file under a path is on the disk."""
    for file in path.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def empty_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def fill_cache(source: Path) -> None:
    os.sync()
    for file in source.rglob("*"):
        if file.is_file():
            with open(file, "rb", buffering=0) as data:
                while data.read(1 << 20):
                    pass


def measure(job: Job, out: Path, prepare: Callable[[Path], None]) -> Run:
    """Runs a job once, from an empty output until its files are synced."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    prepare(job.source)
    command = [part.replace("{out}", str(out)) for part in job.command]
    started = time.perf_counter()
    cpu_seconds, peak = launch(job.name, command)
    sync_tree(out)
    return Run(time.perf_counter() - started, cpu_seconds, peak)


def launch(name: str, command: list[str], output: IO[bytes] | int = subprocess.DEVNULL) -> tuple[float, int]:
    """(CPU seconds, peak resident bytes) of a command that prints to `output`."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as errors:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCH, str(write), *command]
        process = subprocess.Popen(launcher, stdout=output, stderr=errors, pass_fds=(write,))
        os.close(write)
        with open(read) as found:
            text = found.read()
        process.wait()
        code, cpu_seconds, peak = json.loads(text or "[1, 0, 0]")
        if code:
            errors.seek(0)
            raise SystemExit(f"{name} failed with {code}:\n{errors.read().decode()}")
    return cpu_seconds, peak


def bare_interpreter() -> int:
    """Peak resident bytes of a Python that does nothing."""
    return launch("python", [sys.executable, "-c", "pass"])[1]


def native(source: Path, label: str, *options: str) -> Path:
    """A native checkpoint of a repository, made once."""
    path = source.with_name(f"{source.name}-{label}")
    if not path.exists():
        subprocess.run([*CKPT, "convert", str(source), str(path), "--quiet", *options], check=True)
    return path


def jobs(data: Path, layers: int) -> list[Job]:
    """The jobs in the order of a round; their inputs are made where needed."""
    source, wide = make_source(data, layers), make_source(data, 1, GPT_OSS_20B, "gpt-oss")
    whole, sharded = native(source, "native"), native(source, "native-sharded", "--mesh", MESH)
    rows, columns, transposed = make_sharded(source, 0), make_sharded(source, 1), native(wide, "native")

    def ckpt(name: str, verb: str, path: Path, *options: str, cp: str = "cp") -> Job:
        return Job(name, path, [*CKPT, verb, str(path), "{out}", "--quiet", *options], cp)

    def copy(name: str, path: Path) -> Job:
        return Job(name, path, ["cp", "-r", "--reflink=never", str(path), "{out}"], name)

    def peer(name: str, tool: str, path: Path) -> Job:
        return Job(name, path, [sys.executable, str(PEERS), tool, str(path), "{out}"])

    safetensors = ("--format", "safetensors", "--mesh", MESH)
    return [
        copy("cp", source),
        ckpt("convert", "convert", source),
        ckpt(f"convert --mesh {MESH}", "convert", source, "--mesh", MESH),
        ckpt(f"convert --format safetensors --mesh {MESH}", "convert", source, *safetensors),
        ckpt("consolidate .distcp", "consolidate", whole),
        ckpt(f"consolidate .distcp of {MESH}", "consolidate", sharded),
        ckpt("consolidate safetensors by rows", "consolidate", rows),
        ckpt("consolidate safetensors by columns", "consolidate", columns),
        Job("verify (digests)", whole, [*CKPT, "verify", str(whole), "--quiet"]),
        copy("cp, GPT-OSS", wide),
        ckpt("convert GPT-OSS (transposes)", "convert", wide, cp="cp, GPT-OSS"),
        ckpt("consolidate GPT-OSS (transposes)", "consolidate", transposed, cp="cp, GPT-OSS"),
        peer("peer: transformers, convert", "transformers", source),
        peer("peer: safe_open, stack, save_file, convert", "stream", source),
        peer("peer: torch consolidation, rows", "torch_consolidate", rows),
        peer("peer: torch consolidation, columns", "torch_consolidate", columns),
        peer("peer: dcp_to_torch_save", "dcp_to_torch_save", sharded),
        peer("peer: accelerate merge-weights", "accelerate", sharded),
    ]


def main() -> None:
    """Parses the command line, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", choices=("cold", "warm"), default="cold")
    parser.add_argument("--layers", type=int, default=12, help="fewer layers make a smaller checkpoint")
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=re.compile, default=re.compile(""), help="names of jobs to run, as a regex")
    arguments = parser.parse_args()
    data: Path = arguments.data.absolute()
    data.mkdir(parents=True, exist_ok=True)
    prepare = (lambda _: empty_cache()) if arguments.mode == "cold" else fill_cache
    out = data / "out"
    todo = [job for job in jobs(data, arguments.layers) if job.name.startswith("cp") or arguments.jobs.search(job.name)]
    runs: dict[str, list[Run]] = {job.name: [] for job in todo}
    for number in range(arguments.rounds):
        for job in todo:
            run = measure(job, out, prepare)
            runs[job.name].append(run)
            print(f"round {number + 1} {job.name:50} {run.seconds:6.2f} s", file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    report(runs, {job.name: job for job in todo}, arguments)


def nbytes(source: Path) -> int:
    return sum(file.stat().st_size for file in source.rglob("*") if file.is_file())


def report(runs: dict[str, list[Run]], jobs: dict[str, Job], arguments: argparse.Namespace) -> None:
    """Prints medians and ratios, and writes every run to the JSON file."""
    bare = bare_interpreter()
    print(f"{arguments.mode}, {arguments.rounds} rounds, {os.cpu_count()} cores")
    print(f"{'job':50} {'s':>6} {'x cp':>6} {'CPU s':>6} {'peak MB over Python':>20}")
    rows = []
    for name, measured in runs.items():
        ratios = [cp.seconds / run.seconds for cp, run in zip(runs[jobs[name].cp], measured, strict=True)]
        row = {
            "job": name,
            "bytes": nbytes(jobs[jobs[name].cp].source),
            "seconds": statistics.median(r.seconds for r in measured),
            "ratio_to_cp": statistics.median(ratios),
            "cpu_seconds": statistics.median(r.cpu_seconds for r in measured),
            "peak_mb_over_python": max(0, max(r.peak_bytes for r in measured) - bare) / 1e6,
            "runs": [asdict(r) for r in measured],
        }
        rows.append(row)
        print(
            f"{name:50} {row['seconds']:6.2f} {row['ratio_to_cp']:6.2f} {row['cpu_seconds']:6.2f} "
            f"{row['peak_mb_over_python']:20.0f}"
        )
    if arguments.json:
        machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
        configuration = {
            "mode": arguments.mode,
            "rounds": arguments.rounds,
            "config": {**CONFIG, "num_hidden_layers": arguments.layers},
            "machine": machine,
        }
        arguments.json.write_text(json.dumps({"configuration": configuration, "jobs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
