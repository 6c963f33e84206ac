"""The grouped products of an expert block, one by one: torch's, and QuACK's in each of its configurations.

    python benchmarks/grouped_products.py --shapes qwen3-30b-a3b --tokens 4096,16384

The load is uneven. Configurations take turns, and those that fail are listed with their errors. QuACK's products read
rows of tokens by their indices where the block has them so (`gathers`); torch's have them gathered before, which is not
timed, and only QuACK's apply the activation or its derivative. Prints TFLOP/s, the fastest first, and writes JSON with
the whole configuration.

QuACK compiles each configuration when it first meets it, and keeps it in QUACK_CACHE_DIR: several processes with
`--configurations` and `--rounds 1` compile them at once, before the one that times them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from experts import DEVICE, DTYPE, SHAPES, Shape, matmul_peak, milliseconds
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_act, gemm_dact, gemm_tuned

from automodel.kernels.activations import Ungated
from automodel.kernels.permute import sort_by_expert
from automodel.kernels.triton_rows import activation_form

COOPERATIVE = ((256, 128), (256, 160), (256, 192), (128, 224), (128, 256))
PINGPONG = ((128, 128), (128, 160), (128, 192), (192, 128))
"""Rows and columns of a tile: two groups of warps on one, or each on its own."""


class Case(NamedTuple):
    """One product, as torch and as QuACK compute it; with a configuration None that is QuACK's default."""

    name: str
    flops: int
    torch: Callable[[], Any]
    quack: Callable[[GemmConfig | None], Any]
    gathers: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-30b-a3b", help=", ".join(SHAPES))
    parser.add_argument("--tokens", default="16384")
    parser.add_argument("--cases", default="", help="parts of the names of products; all by default")
    parser.add_argument("--configurations", default="", help="parts of the names of QuACK's; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmark-out")))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        {"shape": name, "tokens": tokens, **row}
        for name, tokens in product(arguments.shapes.split(","), map(int, arguments.tokens.split(",")))
        for case in _cases(SHAPES[name], tokens)
        if any(part in case.name for part in arguments.cases.split(","))
        for row in _measured(case, arguments.rounds, arguments.configurations.split(","))
    ]
    made = {
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "quack": version("quack-kernels"),
        "matmul_tflops": round(matmul_peak() / 1e12, 1),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = json.dumps({"configuration": made, "rows": rows}, indent=1)
    (arguments.out / "grouped-products.json").write_text(document + "\n", encoding="utf-8")
    for row in rows:
        speed = f"{row['tflops']:>6.0f} TFLOP/s  {row['ms']:.3f} ms" if "ms" in row else row["error"]
        print(f"{row['shape']:16}{row['tokens']:>7} {row['product']:24}{row['by']:28}{speed}")


def _cases(shape: Shape, tokens: int) -> Iterator[Case]:
    hidden, width, first = shape.hidden, shape.width, shape.width * (1 if isinstance(shape.activation, Ungated) else 2)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=DEVICE, dtype=DTYPE) * 0.02

    logits = torch.randn(tokens, shape.experts, device=DEVICE) + 0.3 * torch.randn(shape.experts, device=DEVICE)
    order = sort_by_expert(logits.topk(shape.top_k, -1).indices, shape.experts)
    ends = torch.cumsum(order.counts_E, 0, dtype=torch.int32)
    starts, token = F.pad(ends, (1, 0)), order.token_M.int()
    x, grad = random(tokens, hidden), random(tokens, hidden)
    rows_x, rows_grad = x[order.token_M], grad[order.token_M]
    h, activated = random(len(token), first), random(len(token), width)
    weight, activation = torch.rand(len(token), device=DEVICE), activation_form(shape.activation).quack
    gate_up, down = random(shape.experts, first, hidden), random(shape.experts, hidden, width)

    def by_row(a: torch.Tensor, b: torch.Tensor, index: torch.Tensor | None, config: GemmConfig | None) -> None:
        out = a.new_empty(len(token), b.shape[-1])
        gemm_tuned.fn(a, b, out, cu_seqlens_m=starts, A_idx=index, config=config)

    def with_activation(config: GemmConfig | None) -> None:
        gemm_act(
            x, gate_up.mT, activation=activation, cu_seqlens_m=starts, A_idx=token, tuned=False, config=config,
            concat_layout=("B",) if activation == "swiglu" else None,
        )  # fmt: skip

    def with_derivative(config: GemmConfig | None) -> None:
        gemm_dact(
            grad, down, PreAct=h, activation=activation, colvec_scale=weight, colvec_reduce=True, cu_seqlens_m=starts,
            A_idx=token, dynamic_scheduler=False, tuned=False, config=config,
        )  # fmt: skip

    def over_rows(a: torch.Tensor, b: torch.Tensor, like: torch.Tensor, config: GemmConfig | None) -> None:
        out = torch.empty_like(like)
        out = out if out.shape[1] == a.shape[1] else out.mT
        gemm_tuned.fn(a.mT, b, out, cu_seqlens_k=starts, A_idx=token, config=config)

    def torch_weights(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(a.t(), b, offs=ends)

    def torch_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(a, b, offs=ends)

    work = 2 * len(token) * hidden
    first_product, grad_product = partial(torch_rows, rows_x, gate_up.mT), partial(torch_rows, rows_grad, down)
    yield Case("first", work * first, first_product, partial(by_row, x, gate_up.mT, token), True)
    yield Case("first of rows", work * first, first_product, partial(by_row, rows_x, gate_up.mT, None), False)
    if activation:
        yield Case("first with activation", work * first, first_product, with_activation, True)
        yield Case("grad of first", work * width, grad_product, with_derivative, True)
    second_product = partial(torch_rows, activated, down.mT)
    yield Case("second", work * width, second_product, partial(by_row, activated, down.mT, None), False)
    yield Case("grad of activated", work * width, grad_product, partial(by_row, grad, down, token), True)
    yield Case("grad of activated of rows", work * width, grad_product, partial(by_row, rows_grad, down, None), False)
    yield Case("grad of rows", work * first, partial(torch_rows, h, gate_up), partial(by_row, h, gate_up, None), False)
    first_weight, second_weight = partial(over_rows, x, h, gate_up), partial(over_rows, grad, activated, down)
    yield Case("grad of first weight", work * first, partial(torch_weights, h, rows_x), first_weight, True)
    yield Case("grad of second weight", work * width, partial(torch_weights, rows_grad, activated), second_weight, True)


def _measured(case: Case, rounds: int, wanted: list[str]) -> list[dict[str, Any]]:
    """The fastest first, then what failed."""
    runs: dict[str, Callable[[], Any]] = {"torch": case.torch, "quack default": partial(case.quack, None)}
    for (tiles, pingpong), cluster in product(((COOPERATIVE, False), (PINGPONG, True)), ((2, 1), (1, 1), (1, 2))):
        if case.gathers and cluster[1] > 1:
            continue
        for m, n in tiles:
            config = GemmConfig(
                tile_m=m,
                tile_n=n,
                pingpong=pingpong,
                cluster_m=cluster[0],
                cluster_n=cluster[1],
                is_dynamic_persistent=False,
            )
            kind = "pingpong" if pingpong else "cooperative"
            name = f"quack {m} x {n} {kind} {cluster[0]} x {cluster[1]}"
            if any(part in name for part in wanted):
                runs[name] = partial(case.quack, config)
    times: dict[str, list[float]] = {name: [] for name in runs}
    errors: dict[str, str] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            if name not in errors:
                try:
                    times[name] += milliseconds(run, 3)
                except Exception as error:  # whatever a compiler raises; the others go on
                    errors[name] = f"{type(error).__name__}: {str(error)[:80]}"
    found = [
        {"product": case.name, "by": name, "ms": round(ms, 4), "tflops": round(case.flops / ms / 1e9, 1)}
        for name, ms in ((name, statistics.median(times[name])) for name in runs if name not in errors)
    ]
    failed = [{"product": case.name, "by": name, "error": error} for name, error in errors.items()]
    return sorted(found, key=lambda row: row["ms"]) + failed


if __name__ == "__main__":
    main()
