"""Rounding to FP8: with one scale a tensor, or one a block.

A matrix [M, N] is needed row by row where the product sums over N, and transposed where it sums over M; a product that
asks for what was not made fails, as there.
"""

# ruff: noqa: ARG002

from dataclasses import dataclass

import torch

from .constants import DType

_DTYPES = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}
_BLOCK = 128


@dataclass
class Quantized:
    """The values that the product sees; None for a direction that was not asked for."""

    rowwise: torch.Tensor | None
    columnwise: torch.Tensor | None


class Float8CurrentScalingQuantizer:
    def __init__(
        self,
        fp8_dtype,
        device,
        *,
        rowwise=True,
        columnwise=True,
        use_existing_amax=False,
        with_amax_reduction=False,
        amax_reduction_group=None,
        force_pow_2_scales=False,
        amax_epsilon=0.0,
        scale=None,
        amax=None,
    ):
        self.dtype = _DTYPES[fp8_dtype]
        self.directions = rowwise, columnwise
        self.internal = False

    def __call__(self, tensor):
        rowwise, columnwise = self.directions
        if not rowwise:
            raise RuntimeError("Quantizing in only the columnwise direction not supported yet!")
        _require_multiples(tensor, 16)
        rounded = _rounded(tensor.double(), tensor.double().abs().amax(), self.dtype)
        return Quantized(rounded, rounded if columnwise else None)


class Float8BlockQuantizer:
    def __init__(
        self, fp8_dtype, *, rowwise, columnwise, amax_epsilon=0.0, force_pow_2_scales=True, block_scaling_dim=2
    ):
        self.dtype = _DTYPES[fp8_dtype]
        self.directions = rowwise, columnwise
        self.power_of_two = force_pow_2_scales
        self.blocks = {1: ((1, _BLOCK), (_BLOCK, 1)), 2: ((_BLOCK, _BLOCK),) * 2}[block_scaling_dim]
        self.internal = False

    def __call__(self, tensor):
        _require_multiples(tensor, _BLOCK)
        wanted = zip(self.directions, self.blocks, strict=True)
        return Quantized(*(self._by_blocks(tensor, block) if used else None for used, block in wanted))

    def _by_blocks(self, tensor, block):
        rows, columns = block
        tiles = tensor.double().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        largest = tiles.abs().amax((1, 3), keepdim=True)
        return _rounded(tiles, largest, self.dtype, power_of_two=self.power_of_two).flatten(2, 3).flatten(0, 1)


def _require_multiples(tensor, of):
    if any(size % of for size in tensor.shape):
        raise RuntimeError(f"FP8 execution requires dimensions divisible by {of}, got {list(tensor.shape)}")


def _rounded(values, largest, dtype, *, power_of_two=False):
    scale = torch.where(largest > 0, torch.finfo(dtype).max / largest, 1.0)
    if power_of_two:
        scale = torch.exp2(scale.log2().floor())
    return (values * scale).float().to(dtype).double() / scale
