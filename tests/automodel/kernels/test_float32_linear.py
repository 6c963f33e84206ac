"""Products in FP32 from parts in BF16, against FP64; without a GPU the parts are multiplied in FP32."""

from __future__ import annotations

import pytest
import torch

from automodel.kernels.float32_linear import float32_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
linear = torch.ops.automodel.float32_linear


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_have_all_digits_of_float32_and_gradients_those_of_what_they_belong_to(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(65, 96, device=DEVICE).bfloat16().requires_grad_()
    # Of all sizes, so that the last digits count.
    weight = (torch.randn(24, 96, device=DEVICE) * torch.logspace(-3, 3, 96, device=DEVICE)).to(dtype).requires_grad_()
    made = linear(x, weight)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = exact_x @ exact_weight.t()
    assert made.dtype == torch.float32
    assert error(made, exact) < 1e-6
    grad = torch.randn_like(made)
    made.backward(grad)
    exact.backward(grad.double())
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, dtype)
    assert error(x.grad, exact_x.grad) < 3e-3  # one rounding to BF16
    assert error(weight.grad, exact_weight.grad) < (3e-3 if dtype == torch.bfloat16 else 1e-5)


def test_the_operation_obeys_the_rules_of_torch() -> None:
    x = torch.randn(6, 16, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.randn(4, 16, device=DEVICE, requires_grad=True)
    torch.library.opcheck(linear.default, (x, weight))


def test_what_is_not_bf16_on_cuda_is_one_product_in_float32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8), torch.randn(4, 8).bfloat16()
    assert torch.equal(float32_linear(x, weight), x @ weight.float().t())
