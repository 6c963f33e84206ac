"""One router, forward and backward: milliseconds in a CUDA graph of the kernels in torch and of the fused ones.

    python benchmarks/routers.py --tokens 4096,16384

Hidden states and weights are random, in BF16 but for a router that is published in FP32. Prints a table and writes JSON
with the whole configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from automodel.backends import Backend
from automodel.moe.group_router import GroupLimitedRouter
from automodel.moe.router import TopKRouter

Router = Callable[[Backend], torch.nn.Module]
_GROUPED = partial(GroupLimitedRouter, normalize=True, scale=2.5)
SHAPES: dict[str, tuple[int, Router]] = {
    "qwen3-30b-a3b": (2048, lambda backend: TopKRouter(2048, 128, 8, backend, normalize=True)),
    "nemotron-3-nano": (
        2688,
        lambda backend: _GROUPED(2688, 128, 6, backend, num_groups=1, top_groups=1, keeps_float32=True),
    ),
    "deepseek-v3": (7168, lambda backend: _GROUPED(7168, 256, 8, backend, num_groups=8, top_groups=4)),
}
"""Hidden size, and what makes the router."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmark-out")))
    arguments = parser.parse_args()
    rows = [
        {"router": name, "tokens": int(tokens), **_measured(*SHAPES[name], int(tokens), arguments.rounds)}
        for name in SHAPES
        for tokens in arguments.tokens.split(",")
    ]
    made = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rounds": arguments.rounds}
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = json.dumps({"configuration": made, "rows": rows}, indent=1)
    (arguments.out / "routers.json").write_text(document + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['router']:20}{row['tokens']:>8,}  torch {row['torch']:.3f} ms  fused {row['fused']:.3f} ms")


def _measured(hidden: int, router: Router, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians by kernel, in turn."""
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, device="cuda").bfloat16().requires_grad_()
    graphs = {kernel: _graph(router(Backend(router=kernel)).cuda().bfloat16(), x) for kernel in ("torch", "fused")}
    times: dict[str, list[float]] = {kernel: [] for kernel in graphs}
    for _ in range(rounds):
        for kernel, graph in graphs.items():
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            graph.replay()
            marks[1].record()
            torch.cuda.synchronize()
            times[kernel] += [begin.elapsed_time(end) for begin, end in pairwise(marks)]
    return {kernel: round(statistics.median(found), 4) for kernel, found in times.items()}


def _graph(router: torch.nn.Module, x: torch.Tensor) -> torch.cuda.CUDAGraph:
    torch.nn.init.normal_(router.weight, std=0.02)
    weight = torch.rand(len(x), router.top_k, device="cuda")

    def step() -> None:
        torch.autograd.grad((router(x)[1].float() * weight).sum(), [x, router.weight])

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


if __name__ == "__main__":
    main()
