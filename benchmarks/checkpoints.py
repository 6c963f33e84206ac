"""Convert and consolidate against `cp` of the same bytes and against transformers, interleaved in one run.

    python benchmarks/checkpoints.py --rounds 5 --mode cold --data bench-data --json benchmarks/results/checkpoints.json

A repository shaped like Qwen3-MoE (hidden 1024, 12 layers, 64 experts of width 768, vocabulary 32768: 3.886 GB in
2,415 tensors) is made once. Every round runs each job once, in the same order; each starts from an empty output and,
in `cold` mode, from an empty page cache (needs root), and ends when the output is on the disk. Ratios are medians over
rounds of cp's time divided by the job's in the same round. Memory is the peak resident size over that of a bare Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ckpt_tools.families import layout_for

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 32768,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
MESH = "dp_shard=2,ep=2"
TRANSFORMERS = (
    "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
    "A.from_pretrained(sys.argv[1], dtype=torch.bfloat16).save_pretrained("
    "sys.argv[2], max_shard_size='1GB', save_original_format=False)"
)


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


def make_source(root: Path, layers: int, shape: Mapping[str, object] = CONFIG, label: str = "hf") -> Path:
    """The repository, made once; its values are random finite BF16 numbers."""
    config = {**shape, "num_hidden_layers": layers}
    source = root / f"{label}-{layers}"
    if source.exists():
        return source
    layout = layout_for(config)
    assert layout is not None
    making = root / "making"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name in sorted(layout.leaves):
        if sum(2 * math.prod(shape) for shape in shards[-1].values()) > 10**9:
            shards.append({})
        shards[-1][name] = layout.leaves[name].shape
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_packed(making / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    (making / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (making / "config.json").write_text(json.dumps(config))
    making.rename(source)
    return source


def write_packed(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file as published ones are: BF16 tensors one after the other behind an unaligned header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Clearing the high exponent bit of each little-endian BF16 keeps every value finite and below 2.
    mask = int.from_bytes(b"\xff\xbf" * (1 << 19), "little")
    block = (int.from_bytes(random.Random(0).randbytes(1 << 20), "little") & mask).to_bytes(1 << 20, "little")
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end, 1 << 20):
            turn = at >> 19 & 0xFFFFE
            out.write((block[turn:] + block[:turn])[: end - at])


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
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read().decode() if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{job.name} failed with {process.returncode}:\n{error}")
    sync_tree(out)
    seconds = time.perf_counter() - started
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def bare_interpreter() -> int:
    """Peak resident bytes of a Python that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return usage.ru_maxrss * 1024


def jobs(source: Path, data: Path, peers: bool) -> list[Job]:
    """The jobs in the order of a round; their inputs are made where needed."""
    ckpt = [sys.executable, "-m", "ckpt_tools"]
    natives = {"whole": data / f"{source.name}-native", "sharded": data / f"{source.name}-native-sharded"}
    for kind, path in natives.items():
        if not path.exists():
            mesh = ["--mesh", MESH] if kind == "sharded" else []
            subprocess.run([*ckpt, "convert", str(source), str(path), "--quiet", *mesh], check=True)
    rows = data / f"{source.name}-safetensors-sharded"
    if not rows.exists():
        options = ["--format", "safetensors", "--mesh", MESH, "--quiet"]
        subprocess.run([*ckpt, "convert", str(source), str(rows), *options], check=True)
    copy = ["cp", "-r", "--reflink=never"]
    found = [
        Job("cp", source, [*copy, str(source), "{out}"]),
        Job("convert", source, [*ckpt, "convert", str(source), "{out}", "--quiet"]),
        Job(f"convert --mesh {MESH}", source, [*ckpt, "convert", str(source), "{out}", "--quiet", "--mesh", MESH]),
        Job(
            "consolidate .distcp",
            natives["whole"],
            [*ckpt, "consolidate", str(natives["whole"]), "{out}", "--quiet"],
        ),
        Job(
            f"consolidate .distcp of {MESH}",
            natives["sharded"],
            [*ckpt, "consolidate", str(natives["sharded"]), "{out}", "--quiet"],
        ),
        Job(
            f"consolidate safetensors of {MESH}",
            rows,
            [*ckpt, "consolidate", str(rows), "{out}", "--quiet"],
        ),
        Job("verify (digests)", natives["whole"], [*ckpt, "verify", str(natives["whole"]), "--quiet"]),
    ]
    if peers and importlib.util.find_spec("transformers"):
        found.append(Job("transformers", source, [sys.executable, "-c", TRANSFORMERS, str(source), "{out}"]))
    return found


def main() -> None:
    """Parses the command line, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", choices=("cold", "warm"), default="cold")
    parser.add_argument("--layers", type=int, default=12, help="fewer layers make a smaller checkpoint")
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-peers", action="store_true", help="leave transformers out")
    arguments = parser.parse_args()
    data: Path = arguments.data.absolute()
    data.mkdir(parents=True, exist_ok=True)
    source = make_source(data, arguments.layers)
    prepare = (lambda _: empty_cache()) if arguments.mode == "cold" else fill_cache
    out = data / "out"
    todo = jobs(source, data, not arguments.no_peers)
    runs: dict[str, list[Run]] = {job.name: [] for job in todo}
    for number in range(arguments.rounds):
        for job in todo:
            run = measure(job, out, prepare)
            runs[job.name].append(run)
            print(f"round {number + 1} {job.name:42} {run.seconds:6.2f} s", file=sys.stderr, flush=True)
    shutil.rmtree(out, ignore_errors=True)
    report(runs, source, arguments)


def report(runs: dict[str, list[Run]], source: Path, arguments: argparse.Namespace) -> None:
    """Prints medians and ratios, and writes every run to the JSON file."""
    nbytes = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    bare = bare_interpreter()
    print(f"{nbytes / 1e9:.2f} GB, {arguments.mode}, {arguments.rounds} rounds, {os.cpu_count()} cores")
    print(f"{'job':42} {'s':>6} {'x cp':>6} {'CPU s':>6} {'peak MB over Python':>20}")
    rows = []
    for name, measured in runs.items():
        ratios = [cp.seconds / run.seconds for cp, run in zip(runs["cp"], measured, strict=True)]
        row = {
            "job": name,
            "seconds": statistics.median(r.seconds for r in measured),
            "ratio_to_cp": statistics.median(ratios),
            "cpu_seconds": statistics.median(r.cpu_seconds for r in measured),
            "peak_mb_over_python": max(0, max(r.peak_bytes for r in measured) - bare) / 1e6,
            "runs": [asdict(r) for r in measured],
        }
        rows.append(row)
        print(
            f"{name:42} {row['seconds']:6.2f} {row['ratio_to_cp']:6.2f} {row['cpu_seconds']:6.2f} "
            f"{row['peak_mb_over_python']:20.0f}"
        )
    if arguments.json:
        machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
        configuration = {
            "bytes": nbytes,
            "mode": arguments.mode,
            "rounds": arguments.rounds,
            "config": {**CONFIG, "num_hidden_layers": arguments.layers},
            "machine": machine,
        }
        arguments.json.write_text(json.dumps({"configuration": configuration, "jobs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
