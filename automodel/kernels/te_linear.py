"""Linear layers through TransformerEngine's matrix products, in half precision or in FP8.

FP8 kernels round input, weight and gradient each time, by the recipes of TransformerEngine: `fp8` with one scale a
tensor, from the largest element it has now (values E4M3, gradients E5M2); `fp8_block` with one a block, 1 x 128 of
activations and 128 x 128 of weights (all E4M3). There is no state between steps, which delayed scaling would have. What
is kept for the backward pass are the input and the weight themselves.

Legend: M rows, I values in, O values out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.autograd.function import FunctionCtx

_Role = Literal["input", "weight", "gradient"]


def te_linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, kernel: str) -> torch.Tensor:
    """x weight^T + bias, [..., O]; differentiable, and one operation to torch.compile.

    Args:
        x: [..., I], of one half-precision dtype with weight and bias.
        kernel: a `LinearKernel` other than `"torch"`, of which all sizes are multiples of what it takes.
    """
    return _linear(x.flatten(0, -2), weight_OI, bias_O, kernel).unflatten(0, x.shape[:-1])


@torch.library.custom_op("automodel::te_linear", mutates_args=())
def _linear(x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, kernel: str) -> torch.Tensor:
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    weight, x = _rounded(weight_OI, "weight", kernel), _rounded(x_MI, "input", kernel)
    # The forward pass alone has the fast accumulation of FP8 products, as in TransformerEngine's recipes.
    return general_gemm(weight, x, out_dtype=x_MI.dtype, layout="TN", bias=bias_O, use_split_accumulator=False)[0]


@_linear.register_fake
def _(x_MI, weight_OI, bias_O, kernel):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return x_MI.new_empty(x_MI.shape[0], weight_OI.shape[0])


@torch.library.custom_op("automodel::te_linear_backward", mutates_args=())
def _linear_backward(
    grad_MO: torch.Tensor, x_MI: torch.Tensor, weight_OI: torch.Tensor, kernel: str, for_x: bool, for_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the input and of the weight; empty where not wanted."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    grad_x, grad_weight = grad_MO.new_empty(0), grad_MO.new_empty(0)
    grad = _rounded(grad_MO, "gradient", kernel, transposed=True)
    how = {"out_dtype": grad_MO.dtype, "use_split_accumulator": True, "grad": True}
    if for_x:
        grad_x = general_gemm(_rounded(weight_OI, "weight", kernel, transposed=True), grad, layout="NN", **how)[0]
    if for_weight:
        grad_weight = general_gemm(_rounded(x_MI, "input", kernel, transposed=True), grad, layout="NT", **how)[0]
    return grad_x, grad_weight


@_linear_backward.register_fake
def _(grad_MO, x_MI, weight_OI, kernel, for_x, for_weight):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return (
        grad_MO.new_empty(x_MI.shape if for_x else 0),
        grad_MO.new_empty(weight_OI.shape if for_weight else 0),
    )


def _save(
    ctx: FunctionCtx,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, str],
    output: torch.Tensor,  # noqa: ARG001
) -> None:
    x_MI, weight_OI, _, ctx.kernel = inputs
    ctx.save_for_backward(x_MI, weight_OI)


def _backward(ctx: FunctionCtx, grad_MO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    for_x, for_weight, for_bias, _ = ctx.needs_input_grad
    grad_x, grad_weight = _linear_backward(grad_MO, *ctx.saved_tensors, ctx.kernel, for_x, for_weight)
    return grad_x if for_x else None, grad_weight if for_weight else None, grad_MO.sum(0) if for_bias else None, None


_linear.register_autograd(_backward, setup_context=_save)


def _rounded(values: torch.Tensor, role: _Role, kernel: str, *, transposed: bool = False) -> torch.Tensor:
    """What the products take: the matrix itself, or it in FP8, also `transposed` where its rows are what is summed."""
    values = values.contiguous()
    if kernel == "te":
        return values
    from transformer_engine.pytorch import DType, Float8BlockQuantizer, Float8CurrentScalingQuantizer

    if kernel == "fp8":
        dtype = DType.kFloat8E5M2 if role == "gradient" else DType.kFloat8E4M3
        quantizer = Float8CurrentScalingQuantizer(dtype, values.device, rowwise=True, columnwise=transposed)
    else:
        blocks = 2 if role == "weight" else 1
        quantizer = Float8BlockQuantizer(
            DType.kFloat8E4M3, rowwise=True, columnwise=transposed, block_scaling_dim=blocks
        )
    # Without the overhead of a tensor that autograd could see.
    quantizer.internal = True
    return quantizer(values)
