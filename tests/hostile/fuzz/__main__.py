"""`python -m tests.hostile.fuzz --inputs N`: N inputs over all targets and processes, by grammar and by coverage.

Half of the inputs are made by `grammar`, the other half by atheris where it is installed (`pip install atheris`), which
follows the branches that they take. What is found is written to `fuzz-findings/` and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tests.hostile.fuzz.grammar import generators
from tests.hostile.fuzz.targets import Targets

SECONDS = 1.0
MEMORY = 1 << 30
"""Address space that one process may take beyond what it has when it starts."""
BATCH = 5000
FINDINGS = Path("fuzz-findings")
TARGETS = ("safetensors", "index", "metadata", "archive", "manifest", "config", "sharded")


@dataclass
class Result:
    """What became of some inputs of one target."""

    target: str
    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    rss: int = 0
    findings: list[tuple[str, bytes]] = field(default_factory=list)

    def add(self, other: Result) -> None:
        self.inputs += other.inputs
        self.accepted += other.accepted
        self.seconds += other.seconds
        self.slowest = max(self.slowest, other.slowest)
        self.rss = max(self.rss, other.rss)
        self.findings += other.findings


def limit_memory() -> None:
    """A MemoryError, and so a finding, for an input that takes a gigabyte."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


def by_grammar(target: str, seed: int, count: int) -> Result:
    """Runs `count` inputs that `seed` determines."""
    choose, targets, result = random.Random(f"{target} {seed}"), Targets(), Result(target)
    make = generators(targets)[target]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(count):
            data = make(choose)
            signal.alarm(20)
            begun = time.process_time()
            try:
                result.accepted += targets.run(target, data)
            except BaseException:
                result.findings.append((traceback.format_exc(limit=-3), data))
            spent = time.process_time() - begun
            signal.alarm(0)
            if spent > SECONDS:
                result.findings.append((f"took {spent:.1f} s", data))
            result.seconds += spent
            result.slowest = max(result.slowest, spent)
            result.inputs += 1
    finally:
        targets.close()
    result.rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return result


def by_coverage(target: str, seed: int, count: int) -> Result:
    """The same through atheris, in a process of its own, because it never returns."""
    FINDINGS.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.hostile.fuzz.coverage", target, f"-runs={count}", f"-seed={seed + 1}"]
    command += ["-max_len=4096", "-timeout=5", "-rss_limit_mb=2048", f"-artifact_prefix={FINDINGS}/{target}-"]
    begun = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    result = Result(target, count, seconds=time.perf_counter() - begun)
    if run.returncode:
        result.findings.append((run.stderr[-3000:], b""))
    return result


def batches(inputs: int, guided: bool) -> Iterator[tuple[bool, str, int, int]]:
    """(by coverage, target, seed, count)."""
    each = inputs // len(TARGETS)
    for target in TARGETS:
        if guided:
            yield True, target, 0, each // 2
        rest = each - each // 2 if guided else each
        for number, first in enumerate(range(0, rest, BATCH)):
            yield False, target, number, min(BATCH, rest - first)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0, help="other inputs from the grammar")
    arguments = parser.parse_args()
    guided = importlib.util.find_spec("atheris") is not None
    begun = time.perf_counter()
    results: dict[tuple[bool, str], Result] = {}
    with ProcessPoolExecutor(arguments.jobs, initializer=limit_memory) as pool:
        jobs = {
            pool.submit(by_coverage if coverage else by_grammar, target, seed + (arguments.seed << 20), count): coverage
            for coverage, target, seed, count in batches(arguments.inputs, guided)
        }
        for job in as_completed(jobs):
            found = job.result()
            results.setdefault((jobs[job], found.target), Result(found.target)).add(found)
    report(results, time.perf_counter() - begun, guided)
    return any(result.findings for result in results.values())


def report(results: dict[tuple[bool, str], Result], seconds: float, guided: bool) -> None:
    """The table, and each kind of finding once with its input saved."""
    write = sys.stdout.write
    write(f"{'target':12} {'by':9} {'inputs':>9} {'accepted':>9} {'slowest':>9} {'RSS':>8}  findings\n")
    for (coverage, target), r in sorted(results.items()):
        how, slowest = ("coverage", "-") if coverage else ("grammar", f"{r.slowest * 1000:.0f} ms")
        accepted, rss = ("-", "-") if coverage else (f"{r.accepted:,}", f"{r.rss} MiB")
        write(f"{target:12} {how:9} {r.inputs:>9,} {accepted:>9} {slowest:>9} {rss:>8}  {len(r.findings)}\n")
        FINDINGS.mkdir(exist_ok=True)
        for number, (text, data) in enumerate({t.strip().split("\n")[-1][:80]: (t, d) for t, d in r.findings}.values()):
            (FINDINGS / f"{target}-{number}").write_bytes(data)
            write(f"{text}\n{data[:300]!r}\n")
    inputs = sum(r.inputs for r in results.values())
    found = sum(len(r.findings) for r in results.values())
    note = "" if guided else " (atheris is not installed: none by coverage)"
    write(f"{inputs:,} inputs in {seconds:,.0f} s, {found} findings{note}\n")


if __name__ == "__main__":
    sys.exit(main())
