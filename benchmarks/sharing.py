"""Convert, consolidate and reshard by sharing blocks against `cp --reflink=never` of the same bytes, interleaved.

    python benchmarks/sharing.py --rounds 5 --json benchmarks/results/sharing.json      (root; xfsprogs, btrfs-progs)

Makes an image of each file system, mounts it through a loop device and puts four checkpoints of `checkpoints.py`'s
model into it: as published (packed behind unaligned headers), and ours: native, native for a mesh, and a repository.
Every round runs each job once, from an empty output until its files are on the disk, and reports three times: of the
whole process; of the call in it, from opening the source to the commit, which is what a program waits for that has
imported `ckpt_tools`; and of placing alone, all system calls that share, the copied edges and fsync, in the process of
the benchmark. Disk is `statvfs` before and after, memory the peak resident size over that of a bare Python.
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
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints import CONFIG, MESH, bare_interpreter, launch, make_source, sync_tree

from ckpt_tools.engine.checkpoint import open_checkpoint
from ckpt_tools.engine.cloning import BLOCK, share
from ckpt_tools.engine.copy import write_frames
from ckpt_tools.engine.files import FileReader, FileWriter
from ckpt_tools.engine.sharding import parse_mesh
from ckpt_tools.engine.targets import plan_huggingface, plan_native

MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
CKPT = [sys.executable, "-m", "ckpt_tools"]


@dataclass(frozen=True)
class Job:
    """`convert` or `consolidate` of a checkpoint, or `cp` of it."""

    name: str
    verb: str
    source: Path
    mesh: str | None = None

    def command(self, out: Path) -> list[str]:
        if self.verb == "cp":
            return ["cp", "-r", "--reflink=never", str(self.source), str(out)]
        mesh = ["--mesh", self.mesh] if self.mesh else []
        return [*CKPT, self.verb, str(self.source), str(out), *mesh, "--json", "--quiet"]


@dataclass(frozen=True)
class Run:
    """One measured run of one job.

    Attributes:
        seconds: of the whole process, until its output is on the disk.
        call_seconds: of `convert` or `consolidate` itself; as `seconds` for cp, like the next.
        placing_seconds: of sharing, copying edges and fsync alone.
        cpu_seconds: of the whole process.
        extra_bytes: disk that the output took.
        shared: part of the output's bytes that is shared.
        peak_bytes: peak resident size.
    """

    seconds: float
    call_seconds: float
    placing_seconds: float
    cpu_seconds: float
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
        subprocess.run(["umount", "--lazy", str(mount)], check=True)
        image.unlink()


def used(mount: Path) -> int:
    """Bytes in use, once the file system has given back what was removed."""
    last = -1
    while True:
        os.sync()
        status = os.statvfs(mount)
        now = (status.f_blocks - status.f_bfree) * status.f_frsize
        if now == last:
            return now
        last = now
        time.sleep(0.3)


def jobs(mount: Path, layers: int) -> list[Job]:
    """The jobs of a round; their inputs are made here."""
    published = make_source(mount, layers)
    native, repository, sharded = mount / "native", mount / "repository", mount / "sharded"
    for command in (
        ["convert", str(published), str(native), "--reflink", "never"],
        ["consolidate", str(native), str(repository)],
        ["convert", str(native), str(sharded), "--mesh", MESH],
    ):
        subprocess.run([*CKPT, *command, "--quiet"], check=True)
    return [
        Job("cp", "cp", published),
        Job("convert, published", "convert", published),
        Job(f"convert --mesh {MESH}, published", "convert", published, MESH),
        Job("convert, ours", "convert", repository),
        Job("consolidate", "consolidate", native),
        Job(f"consolidate, of {MESH}", "consolidate", sharded),
        Job(f"reshard to {MESH}", "convert", native, MESH),
        Job(f"reshard {MESH} to none", "convert", sharded),
    ]


def measure(job: Job, mount: Path) -> Run:
    """Runs a job once, from an empty output until its files are synced."""
    out = mount / "out"
    shutil.rmtree(out, ignore_errors=True)
    before = used(mount)
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        cpu, peak = launch(job.name, job.command(out), output)
        sync_tree(out)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    report = json.loads(text) if text else {"seconds": seconds, "shared": 0, "nbytes": 1}
    extra = used(mount) - before
    placing = seconds if job.verb == "cp" else measure_placing(job, out)
    share_of_bytes = report["shared"] / report["nbytes"]
    return Run(seconds, report["seconds"], placing, cpu, extra, share_of_bytes, peak)


def measure_placing(job: Job, out: Path) -> float:
    """Seconds from empty files to shared and synced ones, planned before."""
    source = open_checkpoint(job.source)
    if job.verb == "consolidate":
        plan = plan_huggingface(source, dtype=None, max_shard_size=5 * 10**9, block=BLOCK)
    else:
        mesh = None if job.mesh is None else parse_mesh(job.mesh)
        plan = plan_native(source, mesh=mesh, file_format="dcp", dtype=None, max_file_size=5 * 10**9, block=BLOCK)
    shutil.rmtree(out)
    out.mkdir()
    os.sync()
    with FileReader(job.source, ahead=False) as reader, FileWriter(out) as writer:
        started = time.perf_counter()
        write_frames(plan.target, writer, plan.sharing.targets)
        if share(plan.sharing, reader, writer):
            raise SystemExit(f"{job.name}: blocks cannot be shared")
        writer.sync()
        return time.perf_counter() - started


def summary(job: Job, runs: list[Run], cps: list[Run], nbytes: int, bare: int) -> dict[str, object]:
    """Medians of a job over the rounds, and of its ratios to cp in the same round."""
    row: dict[str, object] = {"job": job.name}
    for what in ("seconds", "call_seconds", "placing_seconds"):
        times = [getattr(run, what) for run in runs]
        row[what] = statistics.median(times)
        row[f"{what}_ratio_to_cp"] = statistics.median(cp.seconds / t for cp, t in zip(cps, times, strict=True))
    row["cpu_seconds"] = statistics.median(run.cpu_seconds for run in runs)
    row["shared_percent"] = 100 * statistics.median(run.shared for run in runs)
    row["extra_disk_percent"] = 100 * statistics.median(run.extra_bytes for run in runs) / nbytes
    row["peak_mb_over_python"] = max(0, max(run.peak_bytes for run in runs) - bare) / 1e6
    return row | {"runs": [asdict(run) for run in runs]}


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
    bare, results, nbytes = bare_interpreter(), {}, 0
    for kind in arguments.systems.split(","):
        with mounted(kind, arguments.folder.absolute(), arguments.size) as mount:
            todo = jobs(mount, arguments.layers)
            nbytes = sum(file.stat().st_size for file in mount.glob("hf-*/*.safetensors"))
            runs: dict[str, list[Run]] = {job.name: [] for job in todo}
            for number in range(arguments.rounds):
                for job in todo:
                    runs[job.name].append(measure(job, mount))
                    print(f"{kind} round {number + 1} {job.name:36} {runs[job.name][-1]}", file=sys.stderr, flush=True)
        results[kind] = [summary(job, runs[job.name], runs["cp"], nbytes, bare) for job in todo]
        print(f"{kind}, {nbytes / 1e9:.2f} GB, medians of {arguments.rounds}: seconds and times the speed of cp")
        print(
            f"{'job':40} {'process':>14} {'call':>14} {'placing':>14} {'CPU s':>6} {'shared':>7} {'disk':>6} {'MB':>4}"
        )
        for row in results[kind]:
            times = (
                f"{row[what]:6.2f} {row[f'{what}_ratio_to_cp']:6.1f}x"
                for what in ("seconds", "call_seconds", "placing_seconds")
            )
            print(
                f"{row['job']:40} {' '.join(times)} {row['cpu_seconds']:6.2f} {row['shared_percent']:6.1f}% "
                f"{row['extra_disk_percent']:5.2f}% {row['peak_mb_over_python']:4.0f}"
            )
    if arguments.json:
        machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
        config = {**CONFIG, "num_hidden_layers": arguments.layers}
        configuration = {"bytes": nbytes, "rounds": arguments.rounds, "config": config, "machine": machine}
        arguments.json.write_text(json.dumps({"configuration": configuration, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
