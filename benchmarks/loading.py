"""`from_pretrained` of this project against transformers' on the same files, on CPUs, interleaved in one run.

    python benchmarks/loading.py --rounds 3 --data bench-data --json benchmarks/results/loading.json

A repository of `benchmarks/checkpoint_data.py` (Qwen3-MoE, an expert a tensor, BF16) or one of GPT-OSS's shape (experts
stacked and transposed) is made once. Each run is a process of its own, or two over gloo: after its imports it loads the
model, then looks at every element, so that pages which are only mapped are read as well. Memory is the peak resident
size over that after the imports and the parameters held (of the process that has most); bytes are those that read calls
returned, over all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from pathlib import Path

from checkpoint_data import CONFIG, make_source
from checkpoints import empty_cache, fill_cache

GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 1440,
    "intermediate_size": 1440,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 32768,
    "sliding_window": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": True,
    "torch_dtype": "bfloat16",
}
MODELS = {"qwen3_moe": (CONFIG, "hf"), "gpt_oss": (GPT_OSS, "gpt-oss")}

CHILD = """
import json, sys, time
import torch
from torch.distributed.tensor import DTensor
path, loader, mesh = sys.argv[1:]
if loader == "transformers":
    from transformers import AutoModelForCausalLM as Auto
    options = {}
else:
    from automodel import NeMoAutoModelForCausalLM as Auto
    from automodel.parallel.mesh import MeshConfig
    if mesh:
        torch.distributed.init_process_group("gloo")
    axes = dict(axis.split("=") for axis in mesh.split(",")) if mesh else {}
    options = {"device_mesh": MeshConfig(**{axis: int(size) for axis, size in axes.items()}).build()} if axes else {}
def status(file, key):
    return int(next(line.split()[1] for line in open(f"/proc/self/{file}") if line.startswith(key)))
resident, read = status("status", "VmRSS"), status("io", "rchar")
started, cpu = time.perf_counter(), time.process_time()
model = Auto.from_pretrained(path, dtype=torch.bfloat16, **options)
loaded = time.perf_counter() - started
held = 0
for tensor in model.parameters():
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    held += local.nbytes
    local.detach().reshape(-1).view(torch.int16).aminmax()
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "load_seconds": loaded,
    "cpu_seconds": time.process_time() - cpu,
    "extra_bytes": (status("status", "VmHWM") - resident) * 1024 - held,
    "parameter_bytes": held,
    "read_bytes": status("io", "rchar") - read,
}))
if options:
    torch.distributed.destroy_process_group()
"""


def measure(source: Path, loader: str, mesh: str) -> dict[str, float]:
    """One load by one process, or by the two of a mesh: the slowest one's seconds, everything else summed."""
    ranks = 2 if mesh else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(source), loader, mesh],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if mesh else {}),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TRANSFORMERS_VERBOSITY": "error",
            },
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate() for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise SystemExit(f"{loader} {mesh} failed:\n{error}")
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    slowest = ("seconds", "load_seconds", "extra_bytes")
    return {key: (max if key in slowest else sum)(run[key] for run in found) for key in found[0]}


def main() -> None:
    """Parses the command line, measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=MODELS, default="qwen3_moe")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--mode", choices=("cold", "warm"), default="warm")
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.data.mkdir(parents=True, exist_ok=True)
    shape, label = MODELS[arguments.model]
    source = make_source(arguments.data.absolute(), arguments.layers, shape, label)
    jobs = {
        "transformers": ("transformers", ""),
        "ours": ("ours", ""),
        "ours, ep=2": ("ours", "ep=2"),
        "ours, dp_shard=2": ("ours", "dp_shard=2"),
        "ours, dp_replicate=2": ("ours", "dp_replicate=2"),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for _ in range(arguments.rounds):
        for name, (loader, mesh) in jobs.items():
            if arguments.mode == "cold":
                empty_cache()
            else:
                fill_cache(source)
            runs[name].append(measure(source, loader, mesh))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    nbytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{arguments.model}, {nbytes / 1e9:.2f} GB, {arguments.mode}, load {os.getloadavg()[0]:.1f}")
    print(f"{'job':22} {'s':>6} {'x transformers':>15} {'CPU s':>6} {'MB beside parameters':>21} {'x bytes read':>13}")
    rows = []
    for name, measured in runs.items():
        pairs = zip(runs["transformers"], measured, strict=True)
        row = {
            "job": name,
            "seconds": statistics.median(run["seconds"] for run in measured),
            "ratio": statistics.median(peer["seconds"] / run["seconds"] for peer, run in pairs),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in measured),
            "extra_mb": max(run["extra_bytes"] for run in measured) / 1e6,
            "read": statistics.median(run["read_bytes"] for run in measured) / nbytes,
            "runs": measured,
        }
        rows.append(row)
        print(
            f"{name:22} {row['seconds']:6.2f} {row['ratio']:15.2f} {row['cpu_seconds']:6.2f} "
            f"{row['extra_mb']:21.0f} {row['read']:13.2f}"
        )
    if arguments.json:
        machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
        configuration = {
            "model": arguments.model,
            "bytes": nbytes,
            "mode": arguments.mode,
            "rounds": arguments.rounds,
            "config": {**shape, "num_hidden_layers": arguments.layers},
            "machine": machine,
        }
        arguments.json.write_text(json.dumps({"configuration": configuration, "jobs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
