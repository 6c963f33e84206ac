"""Grouped matrix products over rows sorted by expert: QuACK's where it is there, or torch's.

QuACK's run in the cut of `measured.TILE`. Legend: M rows, I and O columns, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from automodel.kernels import measured
from automodel.kernels.experts import grouped, grouped_weight_gradient, rows_obstacle
from automodel.kernels.packages import is_at_least, is_installed


def products_obstacle(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> str | None:
    """Why QuACK's products cannot run on rows of these sizes, or None when they can."""
    if device.type != "cuda":
        return "QuACK's products need CUDA"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "QuACK's products need compute capability 9.0"
    if not (is_installed("triton") and is_installed("quack") and _known_quack()):
        return "QuACK's products need triton and quack-kernels 0.6.2 or a later 0.6, which are not both installed"
    if dtype != torch.bfloat16:
        return f"QuACK's products run in bfloat16, not {str(dtype).removeprefix('torch.')}"
    return rows_obstacle("QuACK", dtype, hidden, width)


def _known_quack() -> bool:
    """0.6.2 is the first whose products with an activation take a configuration; what other products take one by is
    not among its documented functions, and may change with the next minor release."""
    return is_at_least("quack-kernels", 0, 6, 2) and not is_at_least("quack-kernels", 0, 7)


@dataclass(frozen=True, slots=True)
class Products:
    """The products of one layer's rows.

    Attributes:
        ends_E: int32, where the rows of each expert end.
        starts_E: int32 [E + 1], the same after a zero, for QuACK's products; None for torch's.
    """

    ends_E: torch.Tensor
    starts_E: torch.Tensor | None

    @classmethod
    def of(cls, ends_E: torch.Tensor, *, quack: bool) -> Products:
        """QuACK's or torch's."""
        return cls(ends_E, F.pad(ends_E, (1, 0)) if quack else None)

    def by_row(self, rows_MI: torch.Tensor, weight_EIO: torch.Tensor) -> torch.Tensor:
        """row @ w[e] for the rows of each expert e: [M, O]."""
        if self.starts_E is None:
            return grouped(rows_MI, weight_EIO, self.ends_E)
        return product(rows_MI, weight_EIO, self.starts_E)

    def over_rows(self, a_MI: torch.Tensor, b_MO: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
        """a.T @ b over the rows of each expert: [E, I, O], or `transposed` [E, O, I]; contiguous."""
        if self.starts_E is None:
            both = (b_MO, a_MI) if transposed else (a_MI, b_MO)
            return grouped_weight_gradient(*both, self.ends_E)
        return product_over_rows(a_MI, b_MO, self.starts_E, transposed=transposed)


def product(rows_MI: torch.Tensor, weight_EIO: torch.Tensor, starts_E: torch.Tensor) -> torch.Tensor:
    """row @ w[e] for the rows of each expert e, by QuACK: [M, O].

    Args:
        rows_MI: contiguous.
        starts_E: int32 [E + 1], where the rows of each expert begin, then M.
    """
    from quack.gemm_interface import gemm_tuned

    out = rows_MI.new_empty(len(rows_MI), weight_EIO.shape[-1])
    if out.numel():
        gemm_tuned.fn(rows_MI, weight_EIO, out, cu_seqlens_m=starts_E, config=_configuration(out.device))
    return out


def product_and_activation(
    rows_MI: torch.Tensor, weight_EIO: torch.Tensor, starts_E: torch.Tensor, activation: str, *, keeps: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`product`, with gate and up in turn where there are both (None without `keeps`), and the activation of it.

    Args:
        weight_EIO: all columns of the gate, then all of up.
        activation: by QuACK's name.
    """
    from quack.gemm_interface import gemm_act

    made: tuple[torch.Tensor | None, torch.Tensor] = gemm_act(
        rows_MI, weight_EIO, activation=activation, cu_seqlens_m=starts_E, store_preact=keeps, tuned=False,
        config=_configuration(rows_MI.device), concat_layout=("B",) if activation == "swiglu" else None,
    )  # fmt: skip
    return made


def product_over_rows(
    a_MI: torch.Tensor, b_MO: torch.Tensor, starts_E: torch.Tensor, *, transposed: bool = False
) -> torch.Tensor:
    """a.T @ b over the rows of each expert, by QuACK: [E, I, O], or `transposed` [E, O, I]; all contiguous."""
    from quack.gemm_interface import gemm_tuned

    sizes = (b_MO.shape[1], a_MI.shape[1]) if transposed else (a_MI.shape[1], b_MO.shape[1])
    out = a_MI.new_empty(len(starts_E) - 1, *sizes)
    if not len(a_MI):
        return out.zero_()
    made = out.mT if transposed else out
    gemm_tuned.fn(a_MI.mT, b_MO, made, cu_seqlens_k=starts_E, config=_configuration(out.device))
    return out


@cache
def _configuration(device: torch.device) -> Any:
    """How QuACK is to cut a product; None, as it likes, on GPUs of a kind that nothing was measured on."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        return None
    from quack.gemm_config import GemmConfig

    tile = measured.TILE
    return GemmConfig(
        tile_m=tile.rows,
        tile_n=tile.columns,
        pingpong=tile.alternating,
        cluster_m=1,
        cluster_n=1,
        is_dynamic_persistent=False,
    )
