"""Training steps of one model by several implementations, on the same weights, batches and machine, in one run.

    python benchmarks/training.py --case qwen3-30b-8l --implementations ours,transformers --micro-batches 1,4

A step is forward, backward, gradient clipping and fused AdamW in BF16, at sequence length 4,096, with the model's own
router. Weights are random, written once by our class as a Hugging Face repository that every implementation loads.
Every implementation is a process of its own (with `--gpus 2`, two under torchrun). The first steps of each are also
compared in their losses. Prints a table and writes JSON with the whole configuration.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import training_peers
from training_cases import CASES, flops_per_token

SEQUENCE = 4096
OURS = {
    "ours": "auto",
    "ours-without-graphs": "auto",
    "ours-eager": {"layers": "eager"},
    "ours-grouped_mm": {"experts": "grouped_mm"},
    "ours-cudnn": {"sdpa": "cudnn"},
    "ours-all_to_all": {"dispatch": "all_to_all"},
    "ours-symmetric": {"dispatch": "symmetric"},
}
"""Implementation -> our `backend`."""

KINDS = {
    "communication": ("nccl", "barrier_kernel", "_spread_tokens", "_sum_for_peers", "_sum_own", "_publish"),
    "attention": ("sdpa", "fmha", "flash", "dot_do_o", "convert_dq"),
    "experts": ("enable_3x_kernel_for_sm9x", "_activate", "_gather_rows", "_spread_rows", "_sum_rows", "RadixSort"),
    "loss": ("_softmax_gradient", "SoftMax"),
    "optimizer and gradient norm": ("_adamw", "multi_tensor_apply"),
    "dense products": ("nvjet", "gemm", "cublas"),
    "norms, rope, residuals": ("triton_",),
}
"""Kinds of work -> parts of the names of their CUDA kernels; the first that fits counts. The head is dense."""
_ANNOTATIONS = ("Optimizer.", "nccl:", "Memset")


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        _child(arguments)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = Path(arguments.weights) / arguments.case
    if not weights.exists():
        _write_weights(arguments.case, weights)
    rows: list[dict[str, Any]] = []
    for implementation in arguments.implementations.split(","):
        rows += _measure(arguments, implementation)
        document = {"configuration": _configuration(arguments), "rows": rows}
        path = arguments.out / f"training-{arguments.case}-{arguments.gpus}gpu.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(weights)
    _print_table(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="qwen3-30b-8l")
    parser.add_argument("--implementations", default="transformers,transformers-compiled,ours")
    parser.add_argument("--micro-batches", default="1,4", help="4c: with activation checkpointing; those come last")
    parser.add_argument("--sequence", type=int, default=SEQUENCE)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="one step under torch's profiler; kernels into the JSON")
    parser.add_argument("--weights", default="/dev/shm", help="directory for the shared weights")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmark-out")))
    parser.add_argument("--limit", type=float, default=400, help="seconds for one implementation")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "case": arguments.case,
        "config": CASES[arguments.case],
        "sequence": arguments.sequence,
        "dtype": "bfloat16 parameters, gradients and AdamW states",
        "clipping": 1.0,
        "gpus": arguments.gpus,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "warmup": arguments.warmup,
        "steps": arguments.steps,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "flops_per_token": flops_per_token(CASES[arguments.case], arguments.sequence),
    }


def _write_weights(case: str, path: Path) -> None:
    import torch

    from automodel import NeMoAutoModelForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = _config(case)
    model = NeMoAutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, device=torch.device(device))
    model.save_pretrained(path)


def _config(case: str) -> Any:
    from transformers import AutoConfig

    fields = dict(CASES[case])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _measure(arguments: argparse.Namespace, implementation: str) -> list[dict[str, Any]]:
    """Rows of one implementation, from a process of its own; an error becomes a row that says so."""
    own = [Path(__file__).as_posix(), *sys.argv[1:], "--child", implementation]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.gpus}"]
    command = [sys.executable, *(launcher if arguments.gpus > 1 else []), *own]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit, check=False)
        output, errors, code = done.stdout, done.stderr, str(done.returncode)
    except subprocess.TimeoutExpired as late:
        output, errors, code = _text(late.stdout), _text(late.stderr), f"killed after {arguments.limit:g} s"
    (arguments.out / f"{implementation}.log").write_text(output + errors, encoding="utf-8")
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    if code != "0":
        rows.append({"implementation": implementation, "error": f"exit {code}: {errors[-600:]}"})
    return rows


def _text(data: str | bytes | None) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data or ""


def _child(arguments: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    if arguments.gpus > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    weights = Path(arguments.weights) / arguments.case
    model, step = _build(arguments, weights)
    model.train()
    for text in arguments.micro_batches.split(","):
        size, checkpointing = int(text.removesuffix("c")), text.endswith("c")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            row = _time(arguments, model, step, size)
        except torch.cuda.OutOfMemoryError as error:
            row = {"error": f"out of memory: {str(error)[:80]}"}
            torch.cuda.empty_cache()
        row = {"implementation": arguments.child, "micro_batch": size, "checkpointing": checkpointing, **row}
        if not dist.is_initialized() or dist.get_rank() == 0:
            print("ROW " + json.dumps(row), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def _build(arguments: argparse.Namespace, weights: Path) -> tuple[Any, Callable[..., Any]]:
    """The model on its devices, and the function that makes one step with a batch and returns loss and norm."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if arguments.child in OURS:
        return _build_ours(arguments, weights, device)
    if arguments.child == training_peers.NEMO:
        model, loss_of = training_peers.nemo_model(weights, device)
    else:
        model = training_peers.transformers_model(arguments.child, weights)
        loss_of = training_peers.transformers_loss(model)
    if arguments.gpus > 1:
        from automodel import MeshConfig
        from automodel.parallel.fsdp import parallelize

        mesh = MeshConfig(dp_shard=arguments.gpus).build("cuda")
        parallelize(model, mesh, reshard_after_forward=False)
    else:
        model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = ids.to(device, non_blocking=True)
        loss = loss_of(ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    return model, step


def _build_ours(arguments: argparse.Namespace, weights: Path, device: Any) -> tuple[Any, Callable[..., Any]]:
    import torch

    from automodel import MeshConfig, NeMoAutoModelForCausalLM
    from automodel.parallel.mesh import ParallelMesh
    from automodel.training.data import Batch
    from automodel.training.optimizer import OptimizerConfig, build_optimizer
    from automodel.training.step import step_graph, train_step

    mesh = None
    where: dict[str, Any] = {"device": device}
    if arguments.gpus > 1:
        mesh = ParallelMesh.of(MeshConfig(ep=arguments.gpus).build("cuda"))
        where = {"device_mesh": mesh}
    model = NeMoAutoModelForCausalLM.from_pretrained(
        str(weights), dtype=torch.bfloat16, backend=OURS[arguments.child], **where
    )
    optimizer = build_optimizer(model, OptimizerConfig())
    graphs: dict[torch.Size, Any] = {}

    def step(ids: torch.Tensor) -> tuple[float, float]:
        if ids.shape not in graphs:
            graphs.clear()
            graphs[ids.shape] = None if arguments.child == "ours-without-graphs" else step_graph(model, 1)
        batch = Batch(ids, torch.arange(ids.shape[1]).expand_as(ids), ids).to(device)
        result = train_step(model, optimizer, [batch], mesh, max_grad_norm=1.0, graph=graphs[ids.shape])
        return result.loss, result.grad_norm

    return model, step


def _time(arguments: argparse.Namespace, model: Any, step: Callable[..., Any], size: int) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    rank = int(os.environ.get("RANK", "0"))
    generator = torch.Generator().manual_seed(1000 * size + rank)
    vocabulary = model.config.vocab_size

    def batch() -> torch.Tensor:
        # Few distinct tokens, unevenly: something to learn, and a router whose load is not even.
        ids = torch.empty(size, arguments.sequence).exponential_(3.0, generator=generator).mul(200).long()
        return ids.clamp(max=vocabulary - 1)

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    first = 0.0
    for number in range(arguments.warmup + arguments.steps):
        ids = batch()
        _synchronize()
        begun = time.perf_counter()
        loss, norm = step(ids)
        _synchronize()
        elapsed = time.perf_counter() - begun
        first = first or elapsed
        losses.append(round(float(loss), 4))
        if number >= arguments.warmup:
            seconds.append(elapsed)
    median = statistics.median(seconds)
    tokens = size * arguments.sequence
    row = {
        "seconds": round(median, 5),
        "fastest": round(min(seconds), 5),
        "slowest": round(max(seconds), 5),
        "first_step_seconds": round(first, 2),
        "tokens_per_second_per_gpu": round(tokens / median),
        "model_tflops": round(tokens / median * flops_per_token(CASES[arguments.case], arguments.sequence) / 1e12, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else 0.0,
        "grad_norm": round(float(norm), 4),
        "losses": losses,
    }
    if arguments.profile and rank == 0:
        row["kernels"] = _profile(step, batch())
    elif arguments.profile:
        step(batch())
    return row


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _profile(step: Callable[..., Any], ids: Any) -> dict[str, Any]:
    """Milliseconds and calls of the kernels of one step that take longest, and the share of time with none running."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        _synchronize()
        begun = time.perf_counter()
        step(ids)
        _synchronize()
        elapsed = time.perf_counter() - begun
    # Annotations such as Optimizer.step cover kernels that are listed themselves.
    kernels = [
        event
        for event in recorded.key_averages()
        if event.self_device_time_total > 0 and not event.cpu_time_total and not event.key.startswith(_ANNOTATIONS)
    ]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in kernels:
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "other")
        shares[kind] += event.self_device_time_total / 1e3
    return {
        "milliseconds_under_profiler": round(elapsed * 1e3, 2),
        "milliseconds_by_kind": {kind: round(value, 2) for kind, value in shares.items()},
        "top": [[event.key[:90], round(event.self_device_time_total / 1e3, 3), event.count] for event in kernels[:45]],
    }


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'implementation':24}{'mb':>3}{'ms':>9}{'tokens/s/GPU':>14}{'TFLOP/s':>9}{'GiB':>7}  losses")
    for row in rows:
        if "error" in row:
            print(f"{row['implementation']:24}{row.get('micro_batch', ''):>3} {row['error'][-400:]}")
            continue
        losses = f"{row['losses'][0]} .. {row['losses'][-1]}"
        print(
            f"{row['implementation']:24}{row['micro_batch']:>3}{row['seconds'] * 1e3:>9.1f}"
            f"{row['tokens_per_second_per_gpu']:>14,}{row['model_tflops']:>9}{row['peak_gib']:>7}  {losses}"
        )


if __name__ == "__main__":
    main()
