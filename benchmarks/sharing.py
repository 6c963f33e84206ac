"""Convert, consolidate and reshard by sharing blocks against `cp --reflink=never` of the same bytes, interleaved.

    python benchmarks/sharing.py --rounds 5 --json benchmarks/results/sharing.json      (root; xfsprogs, btrfs-progs)

Makes an image of each file system, mounts it through a loop device and puts three checkpoints of `checkpoints.py`'s
model into it: as published (packed behind an unaligned header), and ours, native and as a repository. Every round runs
each job once from an empty output until its files are synced. Reported are whole processes, the seconds of the call
itself (planning to commit), the disk that the output took (`statvfs` before and after), and the peak resident size over
that of a bare Python. A call without its process is what a program that has imported `ckpt_tools` waits for.
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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints import CONFIG, MESH, bare_interpreter, make_source, sync_tree

MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
CKPT = [sys.executable, "-m", "ckpt_tools"]


@dataclass
class Run:
    """One measured run of one job.

    Attributes:
        seconds: of the whole process, until its output is on the disk.
        call_seconds: of `convert` or `consolidate` itself; None for cp.
        extra_bytes: disk that the output took.
        shared: part of the output's bytes that is shared; 0 for cp.
        peak_bytes: peak resident size.
    """

    seconds: float
    call_seconds: float | None
    extra_bytes: int
    shared: float
    peak_bytes: int


@contextmanager
def mounted(kind: str, folder: Path, size: int) -> Iterator[Path]:
    """A new file system of that kind in an image of `size` bytes; both are removed afterwards."""
    image, mount = folder / f"{kind}.img", folder / kind
    image.touch()
    os.truncate(image, size)
    mount.mkdir(exist_ok=True)
    subprocess.run([*MAKE[kind], str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        mount.rmdir()
        image.unlink()


def used(mount: Path) -> int:
    os.sync()
    status = os.statvfs(mount)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def jobs(mount: Path, layers: int) -> dict[str, list[str]]:
    """The commands of a round by name; `{out}` is their output, and their inputs are made here."""
    published = make_source(mount, layers)
    native, repository, sharded = mount / "native", mount / "repository", mount / "sharded"
    for command in (
        ["convert", str(published), str(native), "--reflink", "never"],
        ["consolidate", str(native), str(repository)],
        ["convert", str(native), str(sharded), "--mesh", MESH],
    ):
        subprocess.run([*CKPT, *command, "--quiet"], check=True)
    return {
        "cp": ["cp", "-r", "--reflink=never", str(published), "{out}"],
        "convert, published": [*CKPT, "convert", str(published), "{out}"],
        f"convert --mesh {MESH}, published": [*CKPT, "convert", str(published), "{out}", "--mesh", MESH],
        "convert, ours": [*CKPT, "convert", str(repository), "{out}"],
        "consolidate": [*CKPT, "consolidate", str(native), "{out}"],
        f"consolidate, of {MESH}": [*CKPT, "consolidate", str(sharded), "{out}"],
        f"reshard to {MESH}": [*CKPT, "convert", str(native), "{out}", "--mesh", MESH],
        f"reshard {MESH} to none": [*CKPT, "convert", str(sharded), "{out}"],
    }


def measure(command: list[str], mount: Path) -> Run:
    """Runs a job once, from an empty output until its files are synced."""
    out = mount / "out"
    shutil.rmtree(out, ignore_errors=True)
    before = used(mount)
    ours = command[0] == sys.executable
    command = [part.replace("{out}", str(out)) for part in command] + (["--json", "--quiet"] if ours else [])
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    text = process.stdout.read() if process.stdout else b""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    sync_tree(out)
    seconds = time.perf_counter() - started
    report = json.loads(text) if ours else {"seconds": None, "shared": 0, "nbytes": 1}
    extra = used(mount) - before
    return Run(seconds, report["seconds"], extra, report["shared"] / report["nbytes"], usage.ru_maxrss * 1024)


def summary(name: str, runs: list[Run], cps: list[Run], nbytes: int, bare: int) -> dict[str, object]:
    """Medians of a job over the rounds, and of its ratio to cp in the same round."""
    calls = [run.call_seconds for run in runs if run.call_seconds is not None]
    return {
        "job": name,
        "seconds": statistics.median(run.seconds for run in runs),
        "ratio_to_cp": statistics.median(cp.seconds / run.seconds for cp, run in zip(cps, runs, strict=True)),
        "call_seconds": statistics.median(calls) if calls else None,
        "call_ratio_to_cp": statistics.median(cp.seconds / call for cp, call in zip(cps, calls, strict=True))
        if calls
        else None,
        "shared_percent": 100 * statistics.median(run.shared for run in runs),
        "extra_disk_percent": 100 * statistics.median(run.extra_bytes for run in runs) / nbytes,
        "peak_mb_over_python": max(0, max(run.peak_bytes for run in runs) - bare) / 1e6,
        "runs": [asdict(run) for run in runs],
    }


def main() -> None:
    """Parses the command line, measures on every file system, prints tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="fewer layers make a smaller checkpoint")
    parser.add_argument("--systems", default="xfs,btrfs", help="file systems, joined by commas")
    parser.add_argument("--folder", type=Path, default=Path("bench-data"), help="where the images are made")
    parser.add_argument("--size", type=int, default=14 << 30, help="bytes of an image")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bare, results = bare_interpreter(), {}
    for kind in arguments.systems.split(","):
        with mounted(kind, arguments.folder.absolute(), arguments.size) as mount:
            commands = jobs(mount, arguments.layers)
            nbytes = sum(file.stat().st_size for file in mount.glob("hf-*/*.safetensors"))
            runs: dict[str, list[Run]] = {name: [] for name in commands}
            for number in range(arguments.rounds):
                for name, command in commands.items():
                    runs[name].append(measure(command, mount))
                    print(f"{kind} round {number + 1} {name:36} {runs[name][-1]}", file=sys.stderr, flush=True)
            results[kind] = [summary(name, found, runs["cp"], nbytes, bare) for name, found in runs.items()]
        print(f"{kind}, {nbytes / 1e9:.2f} GB, medians of {arguments.rounds}")
        print(f"{'job':40} {'s':>6} {'x cp':>6} {'call s':>6} {'x cp':>6} {'shared':>7} {'disk':>6} {'MB':>5}")
        for row in results[kind]:
            call, ratio = row["call_seconds"] or row["seconds"], row["call_ratio_to_cp"] or 1
            print(
                f"{row['job']:40} {row['seconds']:6.2f} {row['ratio_to_cp']:6.1f} {call:6.2f} {ratio:6.1f} "
                f"{row['shared_percent']:6.1f}% {row['extra_disk_percent']:5.1f}% {row['peak_mb_over_python']:5.0f}"
            )
    if arguments.json:
        machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
        config = {**CONFIG, "num_hidden_layers": arguments.layers}
        configuration = {"rounds": arguments.rounds, "config": config, "machine": machine}
        arguments.json.write_text(json.dumps({"configuration": configuration, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
