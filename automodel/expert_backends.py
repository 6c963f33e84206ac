"""Which kernels route tokens to experts, carry them there, and multiply."""

from __future__ import annotations

from collections.abc import Callable

import torch

from automodel.backends import Backend, DispatchKernel, Resolved, named_or_fastest, refuse
from automodel.kernels.activations import SWIGLU, GatedActivation, Ungated
from automodel.kernels.choice import fused_choice_obstacle
from automodel.kernels.experts import ExpertsKernel, fused_obstacle, grouped_mm_obstacle
from automodel.kernels.products import products_obstacle
from automodel.kernels.sonic import sonic_obstacle
from automodel.kernels.te import alignment_obstacle, te_obstacle

WEIGHING: tuple[ExpertsKernel, ...] = ("fused", "sonic")
"""Experts that apply the routing weights themselves."""


def resolve_experts(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    width: int,
    activation: GatedActivation | Ungated = SWIGLU,
    *,
    bias: bool = False,
) -> Resolved[ExpertsKernel]:
    """The experts kernel for parameters [E, 2 * width, hidden] on `device` in `dtype`.

    Raises:
        UsageError: a kernel was asked for by name and cannot run.
    """
    obstacles: dict[ExpertsKernel, Callable[[], str | None]] = {
        "te": lambda: te_obstacle(device, dtype) or alignment_obstacle("te", hidden, width),
        "sonic": lambda: sonic_obstacle(device, dtype, hidden, width, activation, bias=bias),
        "fused": lambda: fused_obstacle(device, dtype, hidden, width, activation),
        "grouped_mm": lambda: grouped_mm_obstacle(device, dtype, hidden, width),
        "torch": lambda: None,
    }

    def resolved(kernel: ExpertsKernel, reason: str) -> Resolved[ExpertsKernel]:
        if kernel == "fused":
            slower = products_obstacle(device, dtype, hidden, width)
            reason = f"torch's grouped products multiply: {slower}" if slower else ""
        return Resolved(kernel, reason)

    if backend.experts != "auto":
        if found := obstacles[backend.experts]():
            refuse("experts", backend.experts, found)
        return resolved(backend.experts, "" if backend.experts == "sonic" else "asked for")
    fastest_first: tuple[ExpertsKernel, ...] = ("fused", "grouped_mm")
    reason = ""
    for kernel in fastest_first:
        found = obstacles[kernel]()
        if found is None:
            return resolved(kernel, reason)
        reason = found
    return Resolved("torch", reason)


def resolve_dispatch(backend: Backend, experts: ExpertsKernel, obstacle: str | None) -> Resolved[DispatchKernel]:
    """How tokens reach experts on other processes.

    Args:
        experts: the kernel that multiplies; symmetric dispatch is part of the fused one.
        obstacle: why the processes cannot read each other's memory, None where they can.

    Raises:
        UsageError: `symmetric` or `deepep` was asked for by name and cannot run.
    """
    brought = "torch's grouped products multiply the rows that it brings" if experts == "fused" else ""
    if backend.dispatch == "all_to_all":
        return Resolved("all_to_all", _all_of("asked for", brought))
    if backend.dispatch == "deepep":
        if experts not in WEIGHING:
            refuse(
                "dispatch",
                "deepep",
                "it adds up a token's rows where their experts are, which have to weight them, as "
                f"{' and '.join(WEIGHING)} do, and these run {experts}",
            )
        return Resolved("deepep", brought)
    if obstacle is None and experts != "fused":
        obstacle = f"symmetric dispatch is part of the fused experts, and these run {experts}"
    if obstacle is None:
        return Resolved("symmetric")
    if backend.dispatch == "symmetric":
        refuse("dispatch", "symmetric", obstacle)
    return Resolved("all_to_all", _all_of(obstacle, brought))


def _all_of(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)


def resolve_router(backend: Backend, device: torch.device, experts: int) -> Resolved:
    """What chooses among `experts`.

    Raises:
        UsageError: `fused` was asked for by name and cannot run.
    """
    return named_or_fastest("router", backend.router, "fused", lambda: fused_choice_obstacle(device, experts))
