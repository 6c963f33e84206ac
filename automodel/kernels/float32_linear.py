"""A linear layer on BF16 inputs with the precision of FP32, by tensor cores.

A number in FP32 is the sum of three in BF16, which has its range and a third of its digits. Products of two numbers in
BF16 are exact in FP32, in which tensor cores add them up. So products of a few parts take the place of one in FP32,
which Hopper's tensor cores do not have.

Legend: N tokens, D inputs, E outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

_WHOLE, _GRADIENT = 3, 2
"""Parts in BF16 of a number in FP32: all of its 24 bits, or 16 of them."""


def float32_linear(x_ND: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    """x W^T in FP32: [N, E]; one operation to torch.compile.

    The gradients, in the dtypes of what they belong to, are exact to 16 bits of what comes in.

    Args:
        x_ND: BF16 on CUDA; anything else is computed by one product in FP32.
        weight_ED: BF16 or FP32.
    """
    wanted = x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and weight_ED.dtype in (torch.bfloat16, torch.float32)
    return _linear(x_ND, weight_ED) if wanted else F.linear(x_ND.float(), weight_ED.float())


@torch.library.custom_op("automodel::float32_linear", mutates_args=())
def _linear(x_ND: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    parts = _parts(weight_ED, _WHOLE)
    product = _product(x_ND, torch.cat(parts).t())
    return product if len(parts) == 1 else product.unflatten(1, (len(parts), -1)).sum(1)


@_linear.register_fake
def _(x_ND, weight_ED):  # type: ignore[no-untyped-def]
    return x_ND.new_empty(x_ND.shape[0], weight_ED.shape[0], dtype=torch.float32)


@torch.library.custom_op("automodel::float32_linear_backward", mutates_args=())
def _linear_backward(
    grad_NE: torch.Tensor, x_ND: torch.Tensor, weight_ED: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    high, low = _parts(grad_NE, _GRADIENT)
    whole, *rest = _parts(weight_ED, _GRADIENT)
    # The product of the two low parts is below what is kept.
    grad_x_ND = torch.cat([high, low, *[high] * len(rest)], dim=1) @ torch.cat([whole, whole, *rest])
    grad_weight = _product(torch.cat([high, low], dim=1).t(), x_ND)
    return grad_x_ND, grad_weight.unflatten(0, (2, -1)).sum(0).to(weight_ED.dtype)


@_linear_backward.register_fake
def _(grad_NE, x_ND, weight_ED):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return x_ND.new_empty(x_ND.shape), weight_ED.new_empty(weight_ED.shape)


def _parts(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Tensors in BF16 that add up to one in FP32, the largest first; one in BF16 is its own part."""
    if tensor.dtype == torch.bfloat16:
        return [tensor]
    parts = []
    for _ in range(count):
        parts.append(tensor.bfloat16())
        tensor = tensor - parts[-1]
    return parts


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of matrices in BF16, in FP32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _save(ctx: FunctionCtx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: FunctionCtx, grad_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _linear_backward(grad_NE, *ctx.saved_tensors)


_linear.register_autograd(_backward, setup_context=_save)
