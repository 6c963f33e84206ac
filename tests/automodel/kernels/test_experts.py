"""The expert kernels against a float64 formula, gradients included, with experts that get no rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from automodel.kernels.experts import expert_mlp, grouped_mm_obstacle

HIDDEN, WIDTH = 16, 8
COUNTS = {
    "balanced": (3, 3, 3, 3),
    "empty experts": (0, 7, 0, 2),
    "one expert has all": (0, 0, 9, 0),
    "no rows at all": (0, 0, 0, 0),
}
every_kernel = pytest.mark.parametrize("kernel", ["torch", "grouped_mm"])
every_count = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def inputs(counts: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((sum(counts), HIDDEN), (len(counts), 2 * WIDTH, HIDDEN), (len(counts), HIDDEN, WIDTH))
    return [(torch.randn(shape) * 0.5).to(dtype).requires_grad_() for shape in shapes]


def formula(x_MD: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    """Row by row, from the definition."""
    expert_of_row = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = []
    for x, expert in zip(x_MD, expert_of_row, strict=True):
        gate, up = gate_up[expert, :WIDTH] @ x, gate_up[expert, WIDTH:] @ x
        rows.append(down[expert] @ (F.silu(gate) * up))
    return torch.stack(rows) if rows else x_MD


@every_kernel
@every_count
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_follow_the_formula(
    kernel: str, counts: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    actual_in = inputs(counts, dtype)
    exact_in = [tensor.detach().double().requires_grad_() for tensor in actual_in]
    actual = expert_mlp(actual_in[0], torch.tensor(counts), *actual_in[1:], kernel)
    exact = formula(*exact_in, counts)
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)
    weight = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).view_as(exact)
    (actual * weight.to(dtype)).sum().backward()
    (exact * weight).sum().backward()
    for tensor, reference in zip(actual_in, exact_in, strict=True):
        assert tensor.grad is not None
        expected = torch.zeros_like(reference) if reference.grad is None else reference.grad
        torch.testing.assert_close(tensor.grad.double(), expected, rtol=tolerance, atol=tolerance)


@every_kernel
def test_expanded_gradients_are_accepted(kernel: str) -> None:
    x, gate_up, down = inputs((3, 3, 3, 3), torch.float32)
    expert_mlp(x, torch.tensor([3, 3, 3, 3]), gate_up, down, kernel).sum().backward()
    assert x.grad is not None


@every_kernel
def test_a_process_without_experts_takes_part_in_the_backward_pass(kernel: str) -> None:
    x = torch.zeros(0, HIDDEN, requires_grad=True)
    empty = torch.zeros(0, 2 * WIDTH, HIDDEN), torch.zeros(0, HIDDEN, WIDTH)
    out = expert_mlp(x, torch.zeros(0, dtype=torch.int64), *empty, kernel)
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    assert x.grad is not None


def test_the_loop_runs_in_float64_and_passes_gradcheck() -> None:
    tensors = inputs((2, 0, 3, 1), torch.float64)
    counts = torch.tensor([2, 0, 3, 1])
    assert torch.autograd.gradcheck(lambda x, g, d: expert_mlp(x, counts, g, d, "torch"), tensors)


@pytest.mark.parametrize(
    ("dtype", "hidden", "width", "reason"),
    [
        (torch.bfloat16, 16, 8, None),
        (torch.float32, 16, 4, None),
        (torch.float64, 16, 8, "float64"),
        (torch.bfloat16, 20, 8, "hidden size 20"),
        (torch.bfloat16, 16, 12, "expert width 12"),
    ],
)
def test_obstacles_to_grouped_matrix_multiplication_are_named(
    dtype: torch.dtype, hidden: int, width: int, reason: str | None
) -> None:
    obstacle = grouped_mm_obstacle(torch.device("cpu"), dtype, hidden, width)
    assert obstacle is None if reason is None else reason in obstacle
