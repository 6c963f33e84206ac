"""One expert block over several GPUs (router excluded), forward and backward, by each way of dispatch.

    python benchmarks/dispatch.py --gpus 2

The shape is Qwen3-30B-A3B's, the load uneven. Ways take turns on the same inputs in one run. Errors are against the
loop over experts in FP64, the greatest over the first process's output and gradients; one above `BOUND` fails the run.
The breakdown is the time in kernels of one pass of the first process, by kind; waiting for the other processes is in
`barrier_kernel` and in the collectives, DeepEP's among them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from automodel.backends import Backend
from automodel.kernels.activations import SWIGLU
from automodel.moe.experts import Experts
from automodel.parallel.expert import divide_experts
from ckpt_tools.core.errors import UsageError

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 768, 128, 8
BOUND = 2 * torch.finfo(torch.bfloat16).eps
"""Of the relative error of an output or gradient, in the Frobenius norm: a few roundings to the dtype."""
WAYS = {
    "all_to_all": {"dispatch": "all_to_all"},
    "symmetric": {"dispatch": "symmetric"},
    "deepep": {"dispatch": "deepep"},
    "all_to_all, sonic": {"dispatch": "all_to_all", "experts": "sonic"},
    "deepep, sonic": {"dispatch": "deepep", "experts": "sonic"},
}
"""Backends of the experts; those that cannot run are said and left out."""
KINDS = {
    "products": ("enable_3x_kernel_for_sm9x", "gemm", "nvjet", "cutlass", "prepare_grouped"),
    "waiting": ("barrier_kernel",),
    "collectives": ("nccl", "deep_ep", "intranode"),
    "activation": ("_activate",),
    "fetching and spreading": ("_spread", "_gather_rows", "_publish"),
    "summing": ("_sum_for_peers", "_sum_own", "_sum_rows"),
    "placing": ("_count_choices", "_scan_counts", "_place_pairs", "RadixSort", "sort"),
}
"""Kinds of work -> parts of the names of their kernels; the first that fits counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default="; ".join(WAYS), help="separated by semicolons")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmark-out")))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_rank, (arguments, scratch), nprocs=arguments.gpus)
        rows = json.loads(Path(scratch, "rows.json").read_text(encoding="utf-8"))
    document = {
        "shape": {"hidden": HIDDEN, "width": WIDTH, "experts": EXPERTS, "top_k": TOP_K},
        "gpus": arguments.gpus,
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "dispatch.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"errors may be {BOUND:.4f}")
    print(f"{'tokens':>7} {'dispatch':18}{'forward':>9}{'both':>9}{'host':>8}{'peak GB':>9}{'error':>9}  kernels, ms")
    for row in rows:
        kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in row["kernels_ms"].items() if value)
        print(
            f"{row['tokens']:>7} {row['dispatch']:18}{row['forward_ms']:>9.3f}{row['forward_backward_ms']:>9.3f}"
            f"{row['host_ms']:>8.3f}{row['peak_gb']:>9.2f}{row['relative_error']:>9.5f}  {kinds}"
        )
    sys.exit(0 if all(row["relative_error"] <= BOUND for row in rows) else 1)


def _rank(rank: int, arguments: argparse.Namespace, scratch: str) -> None:
    world = arguments.gpus
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    store = dist.FileStore(f"{scratch}/store", world)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world, device_id=device)
    mesh = init_device_mesh("cuda", (world,), mesh_dim_names=("ep",))
    blocks = {way: block for way in arguments.ways.split("; ") if (block := _block(way, mesh, device)) is not None}
    rows = [row for tokens in map(int, arguments.tokens.split(",")) for row in _measure(blocks, tokens, arguments)]
    if rank == 0:
        Path(scratch, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _block(way: str, mesh: Any, device: torch.device) -> Experts | None:
    with torch.device("meta"):
        experts = Experts(EXPERTS, HIDDEN, WIDTH, SWIGLU, Backend.parse(WAYS[way])).bfloat16()
    try:
        divide_experts(experts, mesh, device)
        experts.resolve_dispatch(experts.kernel_for(torch.empty(0, HIDDEN, device=device, dtype=torch.bfloat16)))
    except UsageError as error:
        if dist.get_rank() == 0:
            print(f"not run: {way}: {error}")
        return None
    experts.to_empty(device=device)
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.to_local().normal_(0.0, 0.02)
    return experts


def _measure(blocks: dict[str, Experts], tokens: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(1000 + dist.get_rank())
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16).requires_grad_()
    logits = torch.randn(tokens, EXPERTS, device="cuda")
    skew = 0.3 * torch.randn(EXPERTS, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    weight, index = (logits + skew).softmax(-1).topk(TOP_K, -1)
    weight = (weight / weight.sum(-1, keepdim=True)).requires_grad_()
    grad = torch.randn_like(x) * 0.1

    def both(block: Experts) -> tuple[torch.Tensor, ...]:
        out = block(x, index, weight)
        return out, *torch.autograd.grad(out, [x, weight, *block.parameters()], grad)

    rows = {}
    reference = _reference(next(iter(blocks.values())), x, index, weight, grad)
    for way, block in blocks.items():
        error = max(_relative(_local(a), b) for a, b in zip(both(block), reference, strict=True))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(block)
        rows[way] = {
            "tokens": tokens,
            "dispatch": way,
            "peak_gb": round((torch.cuda.max_memory_allocated() - before) / 1e9, 3),
            "relative_error": round(error, 6),
        }
    del reference
    times: dict[str, dict[str, list[float]]] = {way: {"forward": [], "both": [], "host": []} for way in blocks}
    for _ in range(arguments.rounds):
        for way, block in blocks.items():
            times[way]["forward"] += _milliseconds(lambda block=block: block(x, index, weight))
            times[way]["both"] += _milliseconds(lambda block=block: both(block), times[way]["host"])
    for way, block in blocks.items():
        rows[way]["forward_ms"] = round(statistics.median(times[way]["forward"]), 4)
        rows[way]["forward_backward_ms"] = round(statistics.median(times[way]["both"]), 4)
        rows[way]["host_ms"] = round(statistics.median(times[way]["host"]), 4)
        rows[way]["kernels_ms"] = _kernels(lambda block=block: both(block))
    return list(rows.values())


def _reference(
    block: Experts, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> list[torch.Tensor]:
    """Output and gradients of this process by definition, in FP64 with all experts, kept in FP32."""
    with torch.device("meta"):
        whole = Experts(EXPERTS, HIDDEN, WIDTH, SWIGLU, Backend.parse("torch"))
    for name, parameter in block.named_parameters():
        setattr(whole, name, torch.nn.Parameter(parameter.full_tensor().double()))
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    out = whole(leaves[0], index, leaves[1])
    own = [out, *torch.autograd.grad(out, [*leaves, *whole.parameters()], grad.double())]
    for gradient in own[3:]:
        dist.all_reduce(gradient)
    world, rank = dist.get_world_size(), dist.get_rank()
    own[3:] = [gradient.chunk(world)[rank] / world for gradient in own[3:]]
    return [tensor.detach().float() for tensor in own]


def _milliseconds(run: Callable[[], Any], host: list[float] | None = None, repeats: int = 5) -> list[float]:
    """Milliseconds of each of several runs in a row on the device; `host` gets those that a run keeps the host."""
    run()
    dist.barrier()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        begun = time.perf_counter()
        run()
        if host is not None:
            host.append(1e3 * (time.perf_counter() - begun))
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def _kernels(run: Callable[[], Any]) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in recorded.key_averages():
        if event.self_device_time_total > 0 and not event.cpu_time_total and not event.key.startswith(("nccl:", "Mem")):
            kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "other")
            spent[kind] += event.self_device_time_total / 3e3
    return {kind: round(value, 4) for kind, value in spent.items()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _relative(actual: torch.Tensor, reference: torch.Tensor) -> float:
    return float((actual.detach().float() - reference).norm() / reference.norm())


if __name__ == "__main__":
    main()
