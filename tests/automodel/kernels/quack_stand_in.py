"""QuACK's grouped products in torch, for machines without a GPU: what they compute, demand and leave undefined.

Arguments, layouts and demands are those of `quack.gemm_interface` in quack-kernels 0.6.5 and of the reference functions
that it ships (`gemm_ref`, `gemm_act_ref`, `gemm_dact_ref`). Rows in no range are NaN here, so that nobody reads them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from automodel.kernels.products import _configuration


@dataclass
class GemmConfig:
    """How a product is cut: the parts that are named here."""

    tile_m: int
    tile_n: int
    pingpong: bool
    cluster_m: int
    cluster_n: int
    is_dynamic_persistent: bool


class Products:
    """The functions; `shapes` are those of the rows and weights that they were called with."""

    def __init__(self) -> None:
        self.shapes: set[tuple[torch.Size, torch.Size]] = set()

    def gemm(
        self, A: Tensor, B: Tensor, out: Tensor | None = None, *, cu_seqlens_m: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, A_idx: Tensor | None = None, dynamic_scheduler: bool = False,
        tuned: bool = True, concat_layout: tuple[str, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        """x @ w[e] for the rows of each e, or x.T @ y over the rows of each e."""
        if cu_seqlens_m is not None:
            return self._by_row(A, B, cu_seqlens_m, A_idx, dynamic_scheduler, tuned, concat_layout)
        self._check(A, B, cu_seqlens_k, A_idx, dynamic_scheduler, tuned)
        assert A.stride(-2) == 1 or not A.numel(), "varlen_k requires A to be m-major"
        assert B.stride(-1) == 1, "varlen_k requires B to be n-major"
        assert out.shape == (len(cu_seqlens_k) - 1, A.shape[0], B.shape[1])
        for e, (start, end) in enumerate(_ranges(cu_seqlens_k)):
            product = (A[:, start:end] if A_idx is None else A[:, A_idx[start:end]]) @ B[start:end]
            assert product.isfinite().all()
            if concat_layout:
                assert concat_layout == ("out",)
                assert out.stride(-2) == 1, "halves are along the dimension that is not contiguous"
                product = torch.cat([product[:, ::2], product[:, 1::2]], -1)
            out[e] = product
        return out

    def gemm_tuned(
        self, A: Tensor, B: Tensor, out: Tensor, *, cu_seqlens_m: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, config: GemmConfig,
    ) -> None:  # fmt: skip
        """`gemm` in one configuration, into `out`."""
        assert not config.is_dynamic_persistent
        if cu_seqlens_m is None:
            self.gemm(A, B, out, cu_seqlens_k=cu_seqlens_k, tuned=False)
        else:
            out.copy_(self.gemm(A, B, cu_seqlens_m=cu_seqlens_m, tuned=False))

    def gemm_act(
        self, A: Tensor, B: Tensor, *, activation: str, cu_seqlens_m: Tensor, A_idx: Tensor | None = None,
        store_preact: bool = True, dynamic_scheduler: bool = False, tuned: bool = True,
        config: GemmConfig | None = None, concat_layout: tuple[str, ...] | None = None,
    ) -> tuple[Tensor | None, Tensor]:  # fmt: skip
        """The product, gate and up in turn, and the activation of it."""
        assert config is None or not config.is_dynamic_persistent
        h = self._by_row(A, B, cu_seqlens_m, A_idx, dynamic_scheduler, tuned, concat_layout)
        return h if store_preact else None, _activated(h, activation)

    def gemm_dact(
        self, A: Tensor, B: Tensor, PreAct: Tensor, activation: str, *, colvec_scale: Tensor, colvec_reduce: bool,
        cu_seqlens_m: Tensor, A_idx: Tensor | None = None, dynamic_scheduler: bool = True, tuned: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradient of `PreAct` where the product is that of the activation before it was scaled, the scaled
        activation, and the dot products of both."""
        grad = self._by_row(A, B, cu_seqlens_m, A_idx, dynamic_scheduler, tuned, None)
        assert len(PreAct) == len(colvec_scale) == len(grad)
        assert colvec_scale.dtype == torch.float32
        assert colvec_reduce
        with torch.enable_grad():
            h = PreAct.detach().requires_grad_()
            activated = _activated(h, activation)
            (grad_h,) = torch.autograd.grad(activated, h, grad * colvec_scale.unsqueeze(1))
        activated = activated.detach()
        reduced = (grad.float() * activated.float()).sum(-1)
        return grad_h.to(A.dtype), (activated * colvec_scale.unsqueeze(1)).to(A.dtype), reduced

    def _by_row(
        self, A: Tensor, B: Tensor, cu_seqlens_m: Tensor, A_idx: Tensor | None, dynamic_scheduler: bool, tuned: bool,
        concat_layout: tuple[str, ...] | None,
    ) -> Tensor:  # fmt: skip
        self._check(A, B, cu_seqlens_m, A_idx, dynamic_scheduler, tuned)
        self.shapes.add((A.shape, B.shape))
        assert A.stride(-1) == 1 or not A.numel(), "varlen_m: A is (total_m, k), k-major"
        assert B.ndim == 3
        assert len(B) == len(cu_seqlens_m) - 1
        if concat_layout:
            assert concat_layout == ("B",)
            along = -2 if B.stride(-1) == 1 else -1
            # In turn, along the dimension that is not contiguous.
            B = torch.stack(B.movedim(along, -1).chunk(2, -1), -1).flatten(-2).movedim(-1, along)
        out = A.new_full((len(A) if A_idx is None else len(A_idx), B.shape[-1]), torch.nan)
        for e, (start, end) in enumerate(_ranges(cu_seqlens_m)):
            out[start:end] = (A[start:end] if A_idx is None else A[A_idx[start:end]]) @ B[e]
        return out

    @staticmethod
    def _check(A: Tensor, B: Tensor, starts: Tensor, A_idx: Tensor | None, dynamic: bool, tuned: bool) -> None:
        assert not tuned, "tuning runs every configuration, and waits for the device, at each new number of rows"
        assert not dynamic, "rows are not gathered under a dynamic scheduler on compute capability 9.0"
        assert A.ndim == 2
        assert A.dtype == B.dtype
        assert starts.dtype == torch.int32
        assert A_idx is None or A_idx.dtype == torch.int32


@contextmanager
def installed_quack() -> Iterator[Products]:
    """The stand-in under QuACK's name, whether or not that is installed."""
    products = Products()
    modules = {name: ModuleType(name) for name in ("quack", "quack.gemm_config", "quack.gemm_interface")}
    modules["quack.gemm_config"].GemmConfig = GemmConfig
    interface = modules["quack.gemm_interface"]
    interface.gemm_tuned = SimpleNamespace(fn=products.gemm_tuned)
    interface.gemm, interface.gemm_act, interface.gemm_dact = products.gemm, products.gemm_act, products.gemm_dact
    before = {name: sys.modules.get(name) for name in modules}
    _configuration.cache_clear()
    sys.modules.update(modules)
    try:
        yield products
    finally:
        _configuration.cache_clear()
        for name, old in before.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old


def _ranges(starts: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(starts.tolist()))


def _activated(h: Tensor, activation: str) -> Tensor:
    if activation == "relu_sq":
        return F.relu(h).square()
    assert activation == "swiglu"
    return F.silu(h[:, ::2]) * h[:, 1::2]
