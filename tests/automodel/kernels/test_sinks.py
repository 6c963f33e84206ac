"""Sinks that join a softmax afterwards, against the definition; without a GPU Triton's interpreter runs the kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from automodel.kernels.triton_sinks import add_sinks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("shape", "dtype"), [((2, 7, 3, 64), torch.bfloat16), ((1, 5, 4, 24), torch.float32)])
def test_output_and_sums_are_those_of_the_softmax_with_the_sink(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    batch, length, heads, _ = shape
    out = torch.randn(shape, device=DEVICE).to(dtype)
    # As kernels return them: heads before positions in memory.
    sums = (4 * torch.randn(batch, heads, length, device=DEVICE)).transpose(1, 2)
    sinks = (4 * torch.randn(heads, device=DEVICE)).to(dtype)
    made, with_sink = add_sinks(out, sums, sinks)
    expected_sums = torch.logaddexp(sums.double(), sinks.double())
    expected = out.double() * (sums.double() - expected_sums).exp().unsqueeze(-1)
    torch.testing.assert_close(with_sink.double(), expected_sums, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made, expected.to(dtype), rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert made.is_contiguous()
    assert with_sink.is_contiguous()


def test_sums_far_apart_and_nothing_to_see() -> None:
    out = torch.ones(1, 4, 1, 8, device=DEVICE)
    sums = torch.tensor([500.0, -500.0, float("-inf"), 0.0], device=DEVICE).view(1, 4, 1)
    made, with_sink = add_sinks(out, sums, torch.tensor([0.0], device=DEVICE))
    assert with_sink.flatten().tolist() == pytest.approx([500.0, 0.0, 0.0, 0.6931472])
    assert made[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.5])
    _, none = add_sinks(out, sums, torch.tensor([float("-inf")], device=DEVICE))
    assert none.flatten().tolist() == [500.0, -500.0, float("-inf"), 0.0]
