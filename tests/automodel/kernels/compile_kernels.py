"""Compiles the Triton kernels for a GPU that need not be there, with the arguments of the functions that launch them.

    python tests/automodel/kernels/compile_kernels.py 90

Prints what cannot be compiled, and which kernel nothing here launches. Triton's interpreter, which runs the kernels in
the other tests, accepts more than its compiler.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from automodel.kernels import (
    triton_adamw,
    triton_group_router,
    triton_heads,
    triton_loss,
    triton_norm,
    triton_peers,
    triton_router,
    triton_rows,
    triton_sinks,
)

MODULES = (
    triton_adamw,
    triton_group_router,
    triton_heads,
    triton_loss,
    triton_norm,
    triton_peers,
    triton_router,
    triton_rows,
    triton_sinks,
)
BF16 = torch.bfloat16


def main() -> int:
    triton.runtime.driver.set_active(_Driver(int(sys.argv[1])))
    launch, compiled, failed = JITFunction.run, set(), []

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        compiled.add(self.__name__)
        try:
            launch(self, *args, **{**kwargs, "warmup": True})
        except Exception as error:  # whatever a compiler raises; the other kernels go on
            failed.append(f"{self.__name__}: {error}")

    JITFunction.run = compile_only
    for run in (optimizer, loss, attention, router, rows, peers):
        run()
    missing = sorted(set().union(*map(kernels, MODULES)) - compiled)
    print("\n".join([*failed, *(f"{name} is launched by nothing here" for name in missing)]))
    print(f"{len(compiled)} kernels compiled for compute capability {sys.argv[1]} by triton {triton.__version__}")
    return 1 if failed or missing or unlisted() else 0


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.get_current_target: Callable[[], GPUTarget] = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device: Callable[[], int] = lambda: 0
        self.get_current_stream: Callable[[int], int] = lambda _: 0
        self.utils = SimpleNamespace()


def kernels(module: ModuleType) -> set[str]:
    """The names of those functions of a module that no other one calls."""
    functions = {name: found for name, found in vars(module).items() if isinstance(found, JITFunction)}
    sources = {name: found.src.partition("):")[2] for name, found in functions.items()}
    return {
        name
        for name in functions
        if not any(re.search(rf"\b{name}\(", source) for other, source in sources.items() if other != name)
    }


def unlisted() -> set[str]:
    """Modules of kernels that `MODULES` lacks."""
    package = Path(importlib.import_module("automodel.kernels").__file__ or "").parent
    found = {path.stem for path in package.glob("triton_*.py")} - {m.__name__.rpartition(".")[2] for m in MODULES}
    for name in found:
        print(f"{name} is not in MODULES")
    return found


def random(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def optimizer() -> None:
    tensors = [random(4096) for _ in range(4)]
    for factor in (None, torch.ones(())):
        triton_adamw.adamw_(*tensors, step=1, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, factor=factor)
    triton_norm.square_sum(tensors)


def loss() -> None:
    triton_loss.softmax_gradient(
        random(4, 151_936), torch.zeros(4, dtype=torch.int64), torch.zeros(4), torch.ones(()), -100
    )
    triton_loss.scaled(random(4096, dtype=torch.float32), torch.ones(()), BF16)


def attention() -> None:
    for groups, heads, size in ((4, 8, 128), (8, 4, 128), (4, 16, 128), (2, 2, 64)):
        qkv, weight = random(2, 16, groups, heads + 2, size), random(size)
        tables = triton_heads.Tables(random(1, 16, size), random(1, 16, size))
        found = triton_heads.norm_and_rotate(qkv, weight, weight, tables, 1e-6, 0.0)
        triton_heads.norm_and_rotate_backward(found, qkv, weight, weight, tables, 1e-6, 0.0)
    triton_sinks.add_sinks(random(2, 16, 8, 64), torch.zeros(2, 8, 16).transpose(1, 2), random(8))


def router() -> None:
    logits = random(64, 128)
    for over_chosen in (False, True):
        weights, indices = triton_router.choose(logits, 8, BF16, over_chosen=over_chosen)
        triton_router.choose_backward(weights, logits, indices, over_chosen=over_chosen)
    for experts, groups, top_groups in ((128, 1, 1), (256, 8, 4), (30, 3, 2)):
        logits, bias = random(64, experts, dtype=torch.float32), torch.zeros(experts)
        weights, indices = triton_group_router.choose_in_groups(
            logits, bias, 6, groups=groups, top_groups=top_groups, normalize=True, scale=2.5
        )
        triton_group_router.choose_in_groups_backward(weights, logits, indices, normalize=True, scale=2.5)


def rows() -> None:
    tokens, top_k, width = 16, 4, 768
    weight, expert = torch.ones(tokens * top_k), torch.zeros(tokens * top_k, dtype=torch.int32)
    ends, used = torch.tensor([8, 64], dtype=torch.int32), torch.tensor([60], dtype=torch.int32)
    for form, biased in (
        (triton_rows.ActivationForm(0), False),
        (triton_rows.ActivationForm(0, in_turn=True), False),
        (triton_rows.ActivationForm(1, 1.702, 7.0), True),
        (triton_rows.ActivationForm(2, parts=1), False),
    ):
        h, bias = random(len(weight), form.parts * width), random(2, form.parts * width) if biased else None
        for limited in (None, used):
            out = triton_rows.activate(h, weight, form, bias, expert if biased else None, limited)
            triton_rows.activate_backward(h, weight, out, form, bias, expert if biased else None, limited)
    x, index = random(tokens, 2880), torch.arange(tokens * top_k)
    triton_rows.gather_rows(x, index)
    spread = triton_rows.spread_rows(x, index, top_k)
    triton_rows.sum_rows(spread, index, top_k, factor=weight)
    triton_rows.sum_rows(spread, index, top_k, weight=weight, bias=random(2, 2880), expert=expert)
    for limited in (None, used):
        triton_rows.add_dot_with_bias(weight, spread, random(2, 2880), expert, limited)
    triton_rows.sum_by_expert(spread, ends, weight)


def peers() -> None:
    processes, tokens, top_k, columns, experts = 4, 16, 8, 2048, 32
    table, own = torch.zeros(processes, dtype=torch.int64), random(tokens, columns)
    choices = torch.zeros(tokens, top_k, dtype=torch.int64), random(tokens, top_k)
    triton_peers.publish(own, table, 0, tokens, choices, (0, 0))
    triton_peers.publish(own, table, 0, tokens)
    for biased in (False, True):
        placement = triton_peers.place_tokens(table, 0, 0, tokens, top_k, 0, experts, with_expert=biased)
        count = len(placement.weight_M)
        kept = random(processes - 1, tokens, columns)
        triton_peers.spread(own, placement.place_WTK, 0, count, table_W=table, kept_STD=kept)
        taken = triton_peers.spread(own, placement.place_WTK, 0, count, kept_STD=kept, scale=0.5)
        bias = random(experts, columns) if biased else None
        for gradient in (None, torch.zeros(count)):
            given = {"bias": bias, "grad_weight_M": gradient, "weight_offset": 64}
            triton_peers.sum_for_peers(taken, placement, 0, table, **given)
            triton_peers.sum_own(taken, placement, 0, choices[0], experts, table, **given)


if __name__ == "__main__":
    sys.exit(main())
