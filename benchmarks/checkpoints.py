"""Convert and consolidate against `cp` of the same bytes and against other tools, interleaved in one run.

    python benchmarks/checkpoints.py --rounds 5 --mode cold --data bench-data --json benchmarks/results/checkpoints.json

A repository shaped like Qwen3-MoE (hidden 1024, 12 layers, 64 experts of width 768, vocabulary 32768: 3.886 GB in 2,415
tensors) and one with the widths of GPT-OSS-20B (one layer, 2.02 GB) are made once, and shards of the first as torch and
trainers write them on 4 ranks. Every round runs each job once and begins with another one; each starts from an empty
output and, in `cold` mode, from an empty page cache (needs root), and ends when the output is on the disk. Ratios are
medians over rounds of the time of cp of the same bytes divided by the job's in the same round, and of a peer's time
divided by that of our job beside it. Memory is the peak resident size over that of a bare Python.

`--jobs REGEX` chooses; only the inputs of chosen jobs are made, of 3.9 GB each. Peers (`checkpoint_peers.py`) run under
`--peers-python`; those it cannot import are named and left out. `--check` compares what each peer made in the first
round with the repository, bit for bit.
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

from checkpoint_data import CONFIG, GPT_OSS_20B, make_saved, make_sharded, make_source
from checkpoint_peers import TOOLS

MESH = "dp_shard=2,ep=2"
CKPT = [sys.executable, "-m", "ckpt_tools"]
PEERS, CHECK = (str(Path(__file__).with_name(f"checkpoint_{name}.py")) for name in ("peers", "check"))
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
    """A command that reads `source` and makes `{out}`."""

    name: str
    source: Path
    command: list[str]


@dataclass(frozen=True)
class Case:
    """A job whose input may not be there yet.

    Attributes:
        name: of the job.
        make: makes the input, once, and returns its directory.
        command: as a job's, with `{source}` for the input.
        cp: name of the job that copies the same bytes.
        needs: module that the interpreter of the peers must have, to make the input or to run.
        ours: name of our job that a peer is compared with.
    """

    name: str
    make: Callable[[], Path]
    command: tuple[str, ...]
    cp: str = "cp"
    needs: str = ""
    ours: str = ""

    @property
    def peer(self) -> bool:
        """Whether another tool runs it."""
        return bool(self.ours)

    def job(self) -> Job:
        """Makes the input, if it is not there."""
        source = self.make()
        return Job(self.name, source, [part.replace("{source}", str(source)) for part in self.command])


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


def cases(data: Path, layers: int, python: str) -> list[Case]:
    """The jobs in the order of a round; `python` runs the peers and makes what trainers save."""

    def source() -> Path:
        return make_source(data, layers)

    def wide() -> Path:
        return make_source(data, 1, GPT_OSS_20B, "gpt-oss")

    def whole() -> Path:
        return native(source(), "native")

    def sharded() -> Path:
        return native(source(), "native-sharded", "--mesh", MESH)

    def rows() -> Path:
        return make_sharded(source(), 0)

    def columns() -> Path:
        return make_sharded(source(), 1)

    def saved(kind: str) -> Callable[[], Path]:
        return lambda: make_saved(source(), kind, python)

    def ckpt(name: str, verb: str, make: Callable[[], Path], *options: str, **fields: str) -> Case:
        return Case(name, make, (*CKPT, verb, "{source}", "{out}", "--quiet", *options), **fields)

    def copy(name: str, make: Callable[[], Path]) -> Case:
        return Case(name, make, ("cp", "-r", "--reflink=never", "{source}", "{out}"), name)

    def peer(name: str, tool: str, make: Callable[[], Path], ours: str) -> Case:
        command = (python, PEERS, tool, "{source}", "{out}")
        return Case(f"peer: {name}", make, command, needs=TOOLS[tool].module, ours=ours)

    safetensors = ("--format", "safetensors", "--mesh", MESH)
    like = ("--like", str(data / f"hf-{layers}"))
    by_rows, by_columns, fsdp = (f"consolidate {x}" for x in ("safetensors by rows", "safetensors by columns", "FSDP"))
    return [
        copy("cp", source),
        ckpt("convert", "convert", source),
        ckpt(f"convert --mesh {MESH}", "convert", source, "--mesh", MESH),
        ckpt(f"convert --format safetensors --mesh {MESH}", "convert", source, *safetensors),
        ckpt("consolidate .distcp", "consolidate", whole),
        ckpt(f"consolidate .distcp of {MESH}", "consolidate", sharded),
        ckpt(by_rows, "consolidate", rows),
        ckpt(by_columns, "consolidate", columns),
        ckpt(fsdp, "consolidate", saved("fsdp"), *like, needs="torch"),
        ckpt("consolidate torchtitan", "consolidate", saved("torchtitan"), *like, needs="torch"),
        Case("verify (digests)", whole, (*CKPT, "verify", "{source}", "--quiet")),
        copy("cp, GPT-OSS", wide),
        ckpt("convert GPT-OSS (transposes)", "convert", wide, cp="cp, GPT-OSS"),
        ckpt("consolidate GPT-OSS (transposes)", "consolidate", lambda: native(wide(), "native"), cp="cp, GPT-OSS"),
        peer("safe_open, stack, save_file, convert", "stream", source, "convert"),
        peer("transformers, convert", "transformers", source, "convert"),
        peer("NeMo AutoModel, convert", "nemo", source, "convert"),
        peer("torchtitan, convert", "torchtitan", source, "convert"),
        peer("torch, rows", "torch_consolidate", rows, by_rows),
        peer("torch, columns", "torch_consolidate", columns, by_columns),
        peer("NeMo AutoModel, rows", "nemo_consolidate", rows, by_rows),
        peer("NeMo AutoModel, columns", "nemo_consolidate", columns, by_columns),
        peer("transformers, rows", "transformers_consolidate", rows, by_rows),
        peer("dcp_to_torch_save, FSDP", "dcp_to_torch_save", saved("fsdp"), fsdp),
        peer("accelerate merge-weights, FSDP", "accelerate", saved("fsdp"), fsdp),
        peer("axolotl merge-sharded-fsdp-weights, FSDP", "axolotl", saved("fsdp"), fsdp),
        peer("verl model_merger, FSDP", "verl", saved("verl"), fsdp),
        peer("torchtitan, consolidate", "torchtitan_consolidate", saved("torchtitan"), "consolidate torchtitan"),
    ]


@dataclass(frozen=True)
class Probe:
    """What the interpreter of the peers has, from `checkpoint_peers.py`: its version, packages, and lacking modules."""

    python: str
    packages: dict[str, str]
    missing: dict[str, str]


def choose(every: list[Case], wanted: re.Pattern[str], python: str) -> tuple[list[Case], Probe]:
    """The cases whose names match and whose modules are there, with the `cp` of each; says what is left out."""
    chosen = [case for case in every if wanted.search(case.name) and not case.name.startswith("cp")]
    command = [python, PEERS, "--probe", *sorted({case.needs for case in chosen if case.needs})]
    found = Probe(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))
    for case in chosen:
        if case.needs in found.missing:
            print(f"not installed: {case.name} ({found.missing[case.needs]})", file=sys.stderr)
    chosen = [case for case in chosen if case.needs not in found.missing]
    copies = {case.cp for case in chosen}
    return [case for case in every if case in chosen or case.name in copies], found


def main() -> None:
    """Parses the command line, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", choices=("cold", "warm"), default="cold")
    parser.add_argument("--layers", type=int, default=12, help="fewer layers make a smaller checkpoint")
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--jobs", type=re.compile, default=re.compile(""), help="names of jobs to run, as a regex")
    parser.add_argument("--peers-python", default=sys.executable, metavar="PATH", help="interpreter that has the peers")
    parser.add_argument("--check", action="store_true", help="compare what peers make with the repository, once")
    arguments = parser.parse_args()
    data: Path = arguments.data.absolute()
    data.mkdir(parents=True, exist_ok=True)
    prepare = (lambda _: empty_cache()) if arguments.mode == "cold" else fill_cache
    out = data / "out"
    peers: str = arguments.peers_python
    chosen, found = choose(cases(data, arguments.layers, peers), arguments.jobs, peers)
    todo = [(case, case.job()) for case in chosen]
    runs: dict[str, list[Run]] = {case.name: [] for case in chosen}
    for number in range(arguments.rounds):
        first = number * len(todo) // arguments.rounds
        for case, job in todo[first:] + todo[:first]:
            run = measure(job, out, prepare)
            runs[job.name].append(run)
            print(f"round {number + 1} {job.name:50} {run.seconds:6.2f} s", file=sys.stderr, flush=True)
            if arguments.check and case.peer and not number:
                source = make_source(data, arguments.layers)
                subprocess.run([peers, CHECK, str(out), str(source)], check=True)
    shutil.rmtree(out, ignore_errors=True)
    report(runs, dict(todo), found, arguments)


def nbytes(source: Path) -> int:
    return sum(file.stat().st_size for file in source.rglob("*") if file.is_file())


def median_ratio(above: list[Run], below: list[Run]) -> float:
    """Median over rounds of the ratio of seconds in a round."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(above, below, strict=True))


def report(runs: dict[str, list[Run]], todo: dict[Case, Job], found: Probe, arguments: argparse.Namespace) -> None:
    """Prints medians and ratios, and writes every run to the JSON file."""
    bare = bare_interpreter()
    print(f"{arguments.mode}, {arguments.rounds} rounds, {os.cpu_count()} cores")
    print(f"{'job':50} {'s':>6} {'x cp':>6} {'x ours':>6} {'CPU s':>6} {'peak MB over Python':>20}")
    sources = {case.name: job.source for case, job in todo.items()}
    rows = []
    for case in todo:
        measured = runs[case.name]
        row = {
            "job": case.name,
            "bytes": nbytes(sources[case.cp]),
            "seconds": statistics.median(r.seconds for r in measured),
            "ratio_to_cp": median_ratio(runs[case.cp], measured),
            "cpu_seconds": statistics.median(r.cpu_seconds for r in measured),
            "peak_mb_over_python": max(0, max(r.peak_bytes for r in measured) - bare) / 1e6,
            "runs": [asdict(r) for r in measured],
        }
        beside = ""
        if case.ours in runs:
            row |= {"ours": case.ours, "ratio_to_ours": median_ratio(measured, runs[case.ours])}
            beside = f"{row['ratio_to_ours']:.2f}"
        rows.append(row)
        print(
            f"{case.name:50} {row['seconds']:6.2f} {row['ratio_to_cp']:6.2f} {beside:>6} {row['cpu_seconds']:6.2f} "
            f"{row['peak_mb_over_python']:20.0f}"
        )
    if arguments.json:
        machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
        configuration = {
            "mode": arguments.mode,
            "rounds": arguments.rounds,
            "config": {**CONFIG, "num_hidden_layers": arguments.layers},
            "machine": machine,
            "peers": {"python": found.python, "packages": found.packages, "not_installed": found.missing},
        }
        arguments.json.write_text(json.dumps({"configuration": configuration, "jobs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
