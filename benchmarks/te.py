"""TransformerEngine's kernels beside those that automodel has otherwise, forward and backward, in milliseconds.

    python benchmarks/te.py

Kernels of a case take turns on the same inputs; times are medians, launched one by one and as a CUDA graph. Errors are
relative, of the output and the largest of the gradients, against the first kernel of the case. `te.Linear` is
TransformerEngine's own module in the same recipe. Its figures are to replace those of `automodel/kernels/measured.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from transformer_engine.common import recipe

from automodel.attention_backends import resolve_spans
from automodel.backends import Backend
from automodel.kernels.activations import SWIGLU
from automodel.kernels.experts import expert_mlp
from automodel.kernels.flash import Spans, causal_attention
from automodel.kernels.packages import is_installed
from automodel.kernels.te_linear import te_linear
from automodel.kernels.te_norm import te_rms_norm

DEVICE, DTYPE = "cuda", torch.bfloat16
LINEARS = [(2048, 6144), (4096, 4096), (4096, 6144), (4096, 12_288), (4096, 28_672), (14_336, 4096), (8192, 28_672)]
RECIPES = {"fp8": recipe.Float8CurrentScaling, "fp8_block": recipe.Float8BlockScaling}
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Kernels that compute the same: each a function of `leaves`, whose gradients are taken too. Where the host `waits`
    for the device, no CUDA graph can hold the kernel."""

    kind: str
    name: str
    leaves: Sequence[torch.Tensor]
    kernels: dict[str, Step]
    waits: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="attention,linear,norm,experts")
    parser.add_argument("--rows", default="8192,16384,32768", help="tokens of the linear layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmark-out")))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # Says what is wrong with an installation before anything is measured.
    resolve_spans(Backend(sdpa="te"), torch.device(DEVICE, 0), DTYPE, 128)
    kinds = {
        "attention": _attention,
        "linear": lambda: _linear([int(rows) for rows in arguments.rows.split(",")]),
        "norm": _norm,
        "experts": _experts,
    }
    document: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "transformer_engine": metadata.version("transformer_engine"),
        "cudnn": te.get_cudnn_version(),
        "rows": [],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"{'':62}{'ms':>9}{'graph':>9}{'output':>10}{'gradients':>10}")
    for kind in arguments.only.split(","):
        for case in kinds[kind]():
            for row in _measured(case, arguments.rounds):
                document["rows"].append(row)
                title = f"{row['case']}: {row['kernel']}"
                if "error" in row:
                    print(f"{title:62} {row['error']}", flush=True)
                    continue
                graph = f"{row['graph_ms']:9.3f}" if row["graph_ms"] else f"{'-':>9}"
                print(
                    f"{title:62}{row['ms']:9.3f}{graph}{row['output_error']:10.1e}{row['gradient_error']:10.1e}",
                    flush=True,
                )
            # After each case, so that a failure keeps what was measured before it.
            (arguments.out / "te.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _attention() -> Iterator[Case]:
    packed = [1000, 3000, 96, 4096]
    short = [256 + 16 * (i % 9 - 4) for i in range(63)]
    for name, lengths, rows, heads, size, window in (
        ("whole, 2 x 4096, 32 and 4 heads of 128", None, 2, (32, 4), 128, 0),
        ("whole, 1 x 16384, 32 and 4 heads of 128", None, 1, (32, 4), 128, 0),
        ("documents of 1000, 3000, 96, 4096", packed, 1, (32, 4), 128, 0),
        ("documents of about 256, 16384 together", [*short, 16_384 - sum(short)], 1, (32, 4), 128, 0),
        ("window of 128, 2 x 4096, 64 and 8 heads of 64", None, 2, (64, 8), 64, 128),
        ("window of 128, documents of 1000, 3000, 96, 4096", packed, 1, (64, 8), 64, 128),
    ):
        length = sum(lengths) if lengths else {2: 4096, 1: 16_384}[rows]
        leaves = [_random(rows, length, n, size) for n in (heads[0], heads[1], heads[1])]
        starts = longest = None
        if lengths:
            starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
            longest = 1 << (max(lengths) - 1).bit_length()
        names = ["flash", "te", *(["flash4"] if is_installed("flash_attn.cute") else [])]
        names += [] if lengths or window else ["cudnn"]
        spans = {kernel: Spans(starts, longest or length, window, kernel) for kernel in names}
        yield Case(
            "attention",
            name,
            leaves,
            {k: lambda s=s, x=leaves, d=size: causal_attention(*x, s, scale=d**-0.5) for k, s in spans.items()},
        )


def _linear(all_rows: list[int]) -> Iterator[Case]:
    for values_in, values_out in LINEARS:
        for rows in all_rows:
            x = _random(rows, values_in)
            weight = torch.nn.Parameter(_random(values_out, values_in, scale=values_in**-0.5).detach())
            kernels: dict[str, Step] = {"torch": lambda x=x, w=weight: F.linear(x, w)}
            for kernel in ("te", "fp8", "fp8_block"):
                kernels[kernel] = lambda x=x, w=weight, k=kernel: te_linear(x, w, None, k)
                kernels[f"te.Linear {kernel}"] = _module(x, weight, kernel)
            yield Case("linear", f"linear {rows} x {values_in} -> {values_out}", (x, weight), kernels)


def _module(x: torch.Tensor, weight: torch.Tensor, kernel: str) -> Step:
    module = te.Linear(weight.shape[1], weight.shape[0], bias=False, params_dtype=DTYPE)
    module.weight = weight

    def run() -> torch.Tensor:
        with te.fp8_autocast(enabled=True, fp8_recipe=RECIPES[kernel]()) if kernel in RECIPES else nullcontext():
            return module(x)

    return run


def _norm() -> Iterator[Case]:
    for rows, size in ((8192, 2048), (32_768, 2048), (262_144, 128)):
        x, weight = _random(rows, size), _random(size)
        kernels: dict[str, Step] = {
            "torch": lambda x=x, w=weight: F.rms_norm(x, w.shape, w, 1e-6),
            "te": lambda x=x, w=weight: te_rms_norm(x, w, 1e-6),
        }
        yield Case("norm", f"norm {rows} x {size}", (x, weight), kernels)


def _experts() -> Iterator[Case]:
    hidden, width = 2048, 768
    for experts, rows in ((16, 16_384), (128, 131_072)):
        share = torch.rand(experts) + 0.5
        counts = (share / share.sum() * rows).long()
        counts[-1] += rows - counts.sum()
        counts = counts.to(DEVICE)
        x = _random(rows, hidden)
        weights = _random(experts, 2 * width, hidden, scale=0.02), _random(experts, hidden, width, scale=0.02)
        kernels: dict[str, Step] = {
            kernel: lambda k=kernel, x=x, c=counts, w=weights: expert_mlp(x, c, *w, k, SWIGLU)
            for kernel in ("grouped_mm", "te")
        }
        yield Case(
            "experts", f"{experts} experts, {rows} rows, {hidden} x {width}", (x, *weights), kernels, waits=("te",)
        )


def _random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE, generator=_generator()) * scale).to(DTYPE).requires_grad_()


@cache
def _generator() -> torch.Generator:
    """One of our own: CUDA graphs take hold of the default one, and keep it where capturing fails."""
    return torch.Generator(DEVICE).manual_seed(0)


def _measured(case: Case, rounds: int) -> list[dict[str, Any]]:
    """One row a kernel."""
    grad: torch.Tensor | None = None
    reference: list[torch.Tensor] = []
    rows: dict[str, dict[str, Any]] = {}
    replays: dict[str, Callable[[], Any] | None] = {}
    for kernel, run in case.kernels.items():
        row = rows[kernel] = {"kind": case.kind, "case": case.name, "kernel": kernel}
        try:
            grad = _random(*run().shape).detach() if grad is None else grad
            values = [run().detach(), *torch.autograd.grad(run(), case.leaves, grad)]
        except (RuntimeError, AssertionError, ValueError) as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        reference = reference or values
        errors = [_relative(a, b) for a, b in zip(values, reference, strict=True)]
        row |= {"output_error": errors[0], "gradient_error": max(errors[1:]), "times": [], "graph_times": []}
        replays[kernel] = None if kernel in case.waits else _graph(run, case.leaves, grad)
    for _ in range(rounds):
        for kernel, replay in replays.items():
            run = case.kernels[kernel]
            rows[kernel]["times"] += _milliseconds(lambda run=run: torch.autograd.grad(run(), case.leaves, grad))
            rows[kernel]["graph_times"] += _milliseconds(replay) if replay else []
    for row in rows.values():
        for key, name in (("times", "ms"), ("graph_times", "graph_ms")):
            times = row.pop(key, None)
            row[name] = round(statistics.median(times), 4) if times else None
    return list(rows.values())


def _graph(run: Step, leaves: Sequence[torch.Tensor], grad: torch.Tensor) -> Callable[[], Any] | None:
    """Forward and backward as a CUDA graph, None where that cannot be captured."""
    stream, graph, before = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            torch.autograd.grad(run(), leaves, grad)
        with torch.cuda.graph(graph, stream=stream):
            torch.autograd.grad(run(), leaves, grad)
    except RuntimeError as error:
        print(f"no graph: {error}".splitlines()[0][:120], flush=True)
        torch.cuda.set_stream(before)
        torch.cuda.synchronize()
        return None
    return graph.replay


def _milliseconds(run: Callable[[], Any], times: int = 5) -> list[float]:
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(times):
        run()
    events[1].record()
    torch.cuda.synchronize()
    return [events[0].elapsed_time(events[1]) / times]


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


if __name__ == "__main__":
    main()
