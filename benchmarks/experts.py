"""One expert block (router excluded), forward and backward: error, milliseconds, share of a matrix product's speed.

    python benchmarks/experts.py --shapes qwen3-30b-a3b,gpt-oss-20b,nemotron-3-nano

Implementations take turns on the same inputs and an uneven load; the ceiling is a product of two 8192 x 8192 BF16
matrices, measured in the same process. Errors are against the loop over experts in FP64, the greatest over the output
and all gradients; one of ours above `BOUND` fails the run. `--peers sonic-moe` adds sonic-moe's own function, which
tunes its products first (minutes; QUACK_PRINT_AUTOTUNING=1 shows what it chose).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen3MoeConfig
from transformers.activations import ACT2FN
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from automodel.backends import Backend
from automodel.kernels.activations import SWIGLU, ClampedSwiGLU, GatedActivation, Ungated
from automodel.moe.experts import Experts
from ckpt_tools.core.errors import UsageError

DEVICE, DTYPE = "cuda", torch.bfloat16
BOUND = 2 * torch.finfo(DTYPE).eps
"""Of the relative error of an output or gradient, in the Frobenius norm: a few roundings to the dtype."""
OURS = ("grouped_mm", "fused", "sonic")
Run = Callable[[], Any]
Block = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Experts of a model."""

    hidden: int
    width: int
    experts: int
    top_k: int
    activation: GatedActivation | Ungated = SWIGLU
    bias: bool = False

    def flops(self, tokens: int) -> int:
        """Forward and backward."""
        matrices = 2 if isinstance(self.activation, Ungated) else 3
        return 3 * 2 * tokens * self.top_k * matrices * self.hidden * self.width


SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4, ClampedSwiGLU(1.702, 7.0), bias=True),
    "nemotron-3-nano": Shape(2688, 1856, 128, 6, Ungated(ACT2FN["relu2"])),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-30b-a3b", help=", ".join(SHAPES))
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", default="transformers", help="transformers, sonic-moe; of Qwen3's shape only")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmark-out")))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    peak = matmul_peak()
    print(f"matmul 8192^3: {peak / 1e12:.0f} TFLOP/s; errors may be {BOUND:.4f}")
    within = [_measure(name, arguments, peak) for name in arguments.shapes.split(",")]
    sys.exit(0 if all(within) else 1)


def _measure(name: str, arguments: argparse.Namespace, peak: float) -> bool:
    """Measure, write and print one shape; whether our errors are within bounds."""
    shape = SHAPES[name]
    rows = [row for tokens in map(int, arguments.tokens.split(",")) for row in _block(shape, tokens, arguments, peak)]
    sizes = {"hidden": shape.hidden, "width": shape.width, "experts": shape.experts, "top_k": shape.top_k}
    document = {
        "model": name,
        "shape": sizes,
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matmul_tflops": round(peak / 1e12, 1),
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = "experts.json" if name == "qwen3-30b-a3b" else f"experts-{name}.json"
    (arguments.out / file).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {sizes}")
    print(f"{'tokens':>7} {'implementation':24}{'forward':>9}{'both':>9}{'share':>7}{'saved GB':>9}{'error':>9}")
    for row in rows:
        print(
            f"{row['tokens']:>7} {row['implementation']:24}{row['forward_ms']:>9.3f}{row['forward_backward_ms']:>9.3f}"
            f"{row['share_of_matmul']:>7.3f}{row['saved_gb']:>9.2f}{row['relative_error']:>9.5f}"
        )
    return all(row["relative_error"] <= BOUND for row in rows if row["implementation"].startswith("ours"))


def matmul_peak() -> float:
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return 2 * 8192**3 / (statistics.median(milliseconds(lambda: a @ b, 30)) * 1e-3)


def _block(shape: Shape, tokens: int, arguments: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    parameters = _parameters(shape)
    x = torch.randn(tokens, shape.hidden, device=DEVICE, dtype=DTYPE).requires_grad_()
    logits = torch.randn(tokens, shape.experts, device=DEVICE) + 0.3 * torch.randn(shape.experts, device=DEVICE)
    weight, index = logits.softmax(-1).topk(shape.top_k, -1)
    weight = (weight / weight.sum(-1, keepdim=True)).to(DTYPE).requires_grad_()
    grad = torch.randn_like(x) * 0.1
    leaves = (x, weight, *parameters.values())

    def both(block: Block) -> tuple[torch.Tensor, ...]:
        out = block(x, index, weight)
        return out, *torch.autograd.grad(out, leaves, grad)

    blocks = _blocks(shape, parameters, arguments.peers.split(","), x)
    reference = _reference(shape, parameters, x, index, weight, grad)
    errors, saved = {}, {}
    for name, block in blocks.items():
        errors[name] = max(_relative(a, b) for a, b in zip(both(block), reference, strict=True))
        before = torch.cuda.memory_allocated()
        out = block(x, index, weight)
        saved[name] = (torch.cuda.memory_allocated() - before) / 1e9
        del out
    del reference
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in blocks}
    for _ in range(arguments.rounds):
        for name, block in blocks.items():
            times[name][0].extend(milliseconds(lambda block=block: block(x, index, weight), 3))
            times[name][1].extend(milliseconds(lambda block=block: both(block), 3))
    rows = []
    for name, (forward, whole) in times.items():
        median = statistics.median(whole)
        rows.append(
            {
                "tokens": tokens,
                "implementation": name,
                "forward_ms": round(statistics.median(forward), 4),
                "forward_backward_ms": round(median, 4),
                "share_of_matmul": round(shape.flops(tokens) / (median * 1e-3) / peak, 4),
                "saved_gb": round(saved[name], 3),
                "relative_error": round(errors[name], 6),
            }
        )
    return rows


def _blocks(
    shape: Shape, parameters: dict[str, torch.nn.Parameter], peers: list[str], x: torch.Tensor
) -> dict[str, Block]:
    """What can run this shape; what cannot is printed with its reason."""
    blocks: dict[str, Block] = {}
    if shape == SHAPES["qwen3-30b-a3b"]:
        makers = {"transformers": _transformers, "sonic-moe": _sonic_moe}
        blocks = {f"{peer}{_MODES[peer]}": makers[peer](shape, *parameters.values()) for peer in peers if peer}
    for kernel in OURS:
        experts = _ours(shape, kernel, parameters)
        try:
            experts.kernel_for(x)
            blocks[f"ours {kernel}"] = experts
        except UsageError as error:
            print(f"not run: {error}")
    return blocks


def _parameters(shape: Shape) -> dict[str, torch.nn.Parameter]:
    with torch.device("meta"):
        like = dict(_ours(shape, "torch", {}).named_parameters())
    return {
        name: torch.nn.Parameter(torch.randn(p.shape, device=DEVICE, dtype=DTYPE) * 0.02) for name, p in like.items()
    }


def _reference(
    shape: Shape,
    parameters: dict[str, torch.nn.Parameter],
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
) -> list[torch.Tensor]:
    """Output and gradients by definition, in FP64, kept in FP32."""
    wide = {name: torch.nn.Parameter(parameter.detach().double()) for name, parameter in parameters.items()}
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    out = _ours(shape, "torch", wide)(leaves[0], index, leaves[1])
    results = out, *torch.autograd.grad(out, [*leaves, *wide.values()], grad.double())
    kept = [result.detach().float() for result in results]
    del wide, leaves, out, results
    gc.collect()
    torch.cuda.empty_cache()
    return kept


_MODES = {"transformers": " grouped_mm", "sonic-moe": " itself, tuned"}


def _transformers(shape: Shape, gate_up: torch.nn.Parameter, down: torch.nn.Parameter) -> Block:
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = gate_up, down
    return module


def _sonic_moe(shape: Shape, gate_up: torch.nn.Parameter, down: torch.nn.Parameter) -> Block:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    def run(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        token = torch.arange(index.numel(), device=DEVICE, dtype=torch.int32) // shape.top_k
        weights = gate_up.permute(1, 2, 0), None, down.permute(1, 2, 0), None
        return moe_general_routing_inputs(
            x, weight.flatten(), token, index.flatten().int(), *weights, E=shape.experts, stream_id=None,
            activation_type=ActivationType.SWIGLU, concat_layout=True,
        )[0]  # fmt: skip

    return run


def _ours(shape: Shape, kernel: str, parameters: dict[str, torch.nn.Parameter]) -> Experts:
    with torch.device("meta"):
        module = Experts(
            shape.experts, shape.hidden, shape.width, shape.activation, Backend.parse({"experts": kernel}),
            bias=shape.bias,
        )  # fmt: skip
    for name, parameter in parameters.items():
        setattr(module, name, parameter)
    return module


def milliseconds(run: Run, repeats: int) -> list[float]:
    run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def _relative(actual: torch.Tensor, reference: torch.Tensor) -> float:
    return float((actual.detach().float() - reference).norm() / reference.norm())


if __name__ == "__main__":
    main()
