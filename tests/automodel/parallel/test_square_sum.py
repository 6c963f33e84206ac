"""The one-pass kernel of gradient norms against a sum in FP64; Triton's interpreter runs it where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from automodel.kernels.triton_norm import square_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_sum_is_that_of_float64_over_any_shapes() -> None:
    torch.manual_seed(0)
    shapes = [(3, 5), (20_000,), (), (0, 4), (1, 8192)]
    tensors = [torch.randn(shape, device=DEVICE) for shape in shapes]
    tensors[1] = tensors[1].half()
    expected = sum(float(tensor.double().square().sum()) for tensor in tensors)
    found = square_sum(tensors)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(found, square_sum(tensors))


def test_what_is_not_finite_is_seen() -> None:
    tensors = [torch.ones(10_000, device=DEVICE), torch.ones(3, device=DEVICE)]
    tensors[0][9_999] = torch.inf
    assert not square_sum(tensors).isfinite()
