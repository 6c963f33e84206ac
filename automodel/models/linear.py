"""A linear layer whose product has several kernels, and which of them runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from automodel.backends import Backend, BackendRow, Resolved, refuse
from automodel.kernels.measured import fp8_narrowest, fp8_rows
from automodel.kernels.te import LinearKernel, alignment_obstacle, te_linear_obstacle
from automodel.kernels.te_linear import te_linear


class Linear(nn.Linear):
    """x weight^T + bias, of which `backend.linear` chooses the kernel; parameters are those of `nn.Linear`.

    Routers, the head, and what is as narrow as a gate are not of this class, and never run in FP8.
    """

    def __init__(self, in_features: int, out_features: int, backend: Backend, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        kernel = self.resolved(x.device, x.dtype, x.shape[:-1].numel()).kernel
        return super().forward(x) if kernel == "torch" else te_linear(x, self.weight, self.bias, kernel)

    def resolved(self, device: torch.device, dtype: torch.dtype, rows: int | None) -> Resolved:
        """`resolve_linear` for `rows` tokens."""
        return resolve_linear(self.backend, device, dtype, rows, self.in_features, self.out_features)


def resolve_linear(
    backend: Backend, device: torch.device, dtype: torch.dtype, rows: int | None, values_in: int, values_out: int
) -> Resolved:
    """The kernel of a linear layer. `auto` is torch's: FP8 changes values, and runs only where it is asked for.

    Args:
        rows: tokens of the input; None for as many as it takes.

    Raises:
        UsageError: a kernel of TransformerEngine was asked for by name and cannot run, whatever the size.
    """
    kernel = backend.linear
    if kernel in ("auto", "torch"):
        return Resolved("torch", "" if kernel == "auto" else "asked for")
    if obstacle := te_linear_obstacle(kernel, device, dtype):
        refuse("linear", kernel, obstacle)
    sizes = (values_in, values_out) if rows is None else (rows, values_in, values_out)
    if obstacle := alignment_obstacle(kernel, *sizes):
        return Resolved("torch", obstacle)
    return Resolved(kernel) if kernel == "te" else _resolve_fp8(kernel, rows, values_in, values_out)


def _resolve_fp8(kernel: LinearKernel, rows: int | None, values_in: int, values_out: int) -> Resolved:
    enough = fp8_rows(kernel, values_in, values_out)
    if enough is None:
        return Resolved("torch", f"{kernel} pays for weights from {fp8_narrowest(kernel)} on")
    if rows is None:
        return Resolved(kernel, f"torch where there are fewer than {enough:,} tokens")
    return Resolved(kernel) if rows >= enough else Resolved("torch", f"{kernel} pays from {enough:,} tokens on")


def linear_rows(
    backend: Backend, modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype
) -> list[BackendRow]:
    """What runs the linear layers, and why not all of them run what was asked for."""
    everywhere = backend.linear in ("auto", "torch")
    fixed = (
        resolve_linear(backend, device, dtype, None, 0, 0) if everywhere else Resolved("torch", "the head and gates")
    )
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    found = Counter(m.resolved(device, dtype, None) if isinstance(m, Linear) else fixed for m in linears)
    ordered = sorted(found, key=lambda how: how.kernel == "torch")
    return [BackendRow("linear", found[how], how.kernel, how.reason) for how in ordered]
