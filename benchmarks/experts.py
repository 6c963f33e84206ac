"""One expert block (router excluded), forward and backward, in milliseconds and as a share of a matrix product's speed.

    python benchmarks/experts.py

The shape is Qwen3-30B-A3B's. Implementations take turns, ours and transformers', on the same inputs and an uneven
load; the ceiling is a product of two 8192 x 8192 BF16 matrices, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from automodel.backends import Backend
from automodel.kernels.activations import SWIGLU
from automodel.moe.experts import Experts

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 768, 128, 8
DEVICE = "cuda"
Run = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmark-out")))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    peak = _peak()
    rows = [row for tokens in map(int, arguments.tokens.split(",")) for row in _block(tokens, arguments.rounds, peak)]
    document = {
        "shape": {"hidden": HIDDEN, "width": WIDTH, "experts": EXPERTS, "top_k": TOP_K},
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matmul_tflops": round(peak / 1e12, 1),
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "experts.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"matmul 8192^3: {peak / 1e12:.0f} TFLOP/s")
    print(f"{'tokens':>7} {'implementation':22}{'forward':>9}{'both':>9}{'share':>7}{'saved GB':>9}{'error':>9}")
    for row in rows:
        print(
            f"{row['tokens']:>7} {row['implementation']:22}{row['forward_ms']:>9.3f}{row['forward_backward_ms']:>9.3f}"
            f"{row['share_of_matmul']:>7.3f}{row['saved_gb']:>9.2f}{row['relative_error']:>9.5f}"
        )


def _peak() -> float:
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (statistics.median(_milliseconds(lambda: a @ b, 30)) * 1e-3)


def _block(tokens: int, rounds: int, peak: float) -> list[dict[str, Any]]:
    gate_up, down = _weights()
    x = torch.randn(tokens, HIDDEN, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    logits = torch.randn(tokens, EXPERTS, device=DEVICE) + 0.3 * torch.randn(EXPERTS, device=DEVICE)
    weight, index = logits.softmax(-1).topk(TOP_K, -1)
    weight = (weight / weight.sum(-1, keepdim=True)).to(torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x) * 0.1
    flops = 3 * 2 * tokens * TOP_K * 3 * HIDDEN * WIDTH
    blocks = {
        "transformers grouped_mm": _theirs(gate_up, down),
        "ours grouped_mm": _ours("grouped_mm", gate_up, down),
        "ours fused": _ours("fused", gate_up, down),
    }
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in blocks}
    leaves = (x, weight, gate_up, down)

    def both(block: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        out = block(x, index, weight)
        return out, *torch.autograd.grad(out, leaves, grad)

    reference = both(blocks["transformers grouped_mm"])
    errors, saved = {}, {}
    for name, block in blocks.items():
        results = both(block)
        errors[name] = max(_relative(a, b) for a, b in zip(results, reference, strict=True))
        del results
        before = torch.cuda.memory_allocated()
        out = block(x, index, weight)
        saved[name] = (torch.cuda.memory_allocated() - before) / 1e9
        del out
    for _ in range(rounds):
        for name, block in blocks.items():
            times[name][0].extend(_milliseconds(lambda block=block: block(x, index, weight), 3))
            times[name][1].extend(_milliseconds(lambda block=block: both(block), 3))
    rows = []
    for name, (forward, whole) in times.items():
        median = statistics.median(whole)
        rows.append(
            {
                "tokens": tokens,
                "implementation": name,
                "forward_ms": round(statistics.median(forward), 4),
                "forward_backward_ms": round(median, 4),
                "share_of_matmul": round(flops / (median * 1e-3) / peak, 4),
                "saved_gb": round(saved[name], 3),
                "relative_error": round(errors[name], 6),
            }
        )
    return rows


def _weights() -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    shapes = (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    first, second = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 0.02 for shape in shapes)
    return torch.nn.Parameter(first), torch.nn.Parameter(second)


def _theirs(gate_up: torch.nn.Parameter, down: torch.nn.Parameter) -> Callable[..., torch.Tensor]:
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = gate_up, down
    return module


def _ours(kernel: str, gate_up: torch.nn.Parameter, down: torch.nn.Parameter) -> Callable[..., torch.Tensor]:
    with torch.device("meta"):
        module = Experts(EXPERTS, HIDDEN, WIDTH, SWIGLU, Backend.parse(kernel))
    module.gate_up_proj, module.down_proj = gate_up, down
    return module


def _milliseconds(run: Run, repeats: int) -> list[float]:
    run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def _relative(actual: torch.Tensor, reference: torch.Tensor) -> float:
    return float((actual.float() - reference.float()).norm() / reference.float().norm())


if __name__ == "__main__":
    main()
