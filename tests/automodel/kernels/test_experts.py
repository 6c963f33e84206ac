"""The expert kernels against a float64 formula, gradients included, with experts that get no rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from automodel.kernels.activations import SWIGLU, ClampedSwiGLU, GatedActivation, Ungated
from automodel.kernels.experts import expert_mlp, grouped_mm_obstacle

HIDDEN, WIDTH = 16, 8
COUNTS = {
    "balanced": (3, 3, 3, 3),
    "empty experts": (0, 7, 0, 2),
    "one expert has all": (0, 0, 9, 0),
    "no rows at all": (0, 0, 0, 0),
}
RELU_SQUARED = Ungated(ACT2FN["relu2"])
every_kernel = pytest.mark.parametrize("kernel", ["torch", "grouped_mm"])
every_count = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def inputs(counts: tuple[int, ...], dtype: torch.dtype, *, biases: bool = False) -> list[torch.Tensor]:
    """Rows, gate and up, down; and the two biases if asked for."""
    torch.manual_seed(0)
    experts = len(counts)
    shapes = [(sum(counts), HIDDEN), (experts, 2 * WIDTH, HIDDEN), (experts, HIDDEN, WIDTH)]
    shapes += [(experts, 2 * WIDTH), (experts, HIDDEN)] if biases else []
    return [(torch.randn(shape) * 0.5).to(dtype).requires_grad_() for shape in shapes]


def run(
    counts: tuple[int, ...], kernel: str, tensors: list[torch.Tensor], activation: GatedActivation = SWIGLU
) -> torch.Tensor:
    x, gate_up, down, gate_up_bias, down_bias = (*tensors, None, None)[:5]
    return expert_mlp(
        x,
        torch.tensor(counts),
        gate_up,
        down,
        kernel,
        activation,
        gate_up_bias_E2F=gate_up_bias,
        down_bias_ED=down_bias,
    )


def formula(counts: tuple[int, ...], tensors: list[torch.Tensor]) -> torch.Tensor:
    """Row by row, from the definition."""
    x_MD, gate_up, down, *biases = tensors
    expert_of_row = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = []
    for x, expert in zip(x_MD, expert_of_row, strict=True):
        first, second = (bias[expert] for bias in biases) if biases else (0, 0)
        gate, up = (gate_up[expert] @ x + first).chunk(2)
        rows.append(down[expert] @ (F.silu(gate) * up) + second)
    return torch.stack(rows) if rows else x_MD


@every_kernel
@every_count
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_follow_the_formula(
    kernel: str, counts: tuple[int, ...], biases: bool, dtype: torch.dtype, tolerance: float
) -> None:
    actual_in = inputs(counts, dtype, biases=biases)
    exact_in = [tensor.detach().double().requires_grad_() for tensor in actual_in]
    actual = run(counts, kernel, actual_in)
    exact = formula(counts, exact_in)
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)
    weight = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).view_as(exact)
    (actual * weight.to(dtype)).sum().backward()
    (exact * weight).sum().backward()
    for tensor, reference in zip(actual_in, exact_in, strict=True):
        assert tensor.grad is not None
        expected = torch.zeros_like(reference) if reference.grad is None else reference.grad
        torch.testing.assert_close(tensor.grad.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_a_bias_is_summed_in_float32() -> None:
    # 3,000 ones: BF16 sums stop growing at 256.
    tensors = [t.detach() for t in inputs((3000, 0), torch.bfloat16, biases=True)]
    tensors[4].requires_grad_()
    run((3000, 0), "grouped_mm", tensors).sum().backward()
    assert tensors[4].grad[0].float() == pytest.approx(3000, rel=1 / 256)
    assert not tensors[4].grad[1].any()


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


@pytest.mark.parametrize("activation", [SWIGLU, ClampedSwiGLU(1.702, 0.7)])
def test_the_loop_runs_in_float64_and_passes_gradcheck(activation: GatedActivation) -> None:
    counts = (2, 0, 3, 1)
    tensors = inputs(counts, torch.float64, biases=True)
    assert torch.autograd.gradcheck(lambda *given: run(counts, "torch", given, activation), tensors)


@every_kernel
@every_count
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_experts_without_a_gate_follow_the_formula(
    kernel: str, counts: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    given = inputs(counts, dtype)
    given[1] = given[1].detach()[:, :WIDTH].clone().requires_grad_()
    exact_in = [tensor.detach().double().requires_grad_() for tensor in given]
    actual = expert_mlp(given[0], torch.tensor(counts), *given[1:], kernel, RELU_SQUARED)
    x_MD, up, down = exact_in
    expert_of_row = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = [down[e] @ F.relu(up[e] @ x).square() for x, e in zip(x_MD, expert_of_row, strict=True)]
    exact = torch.stack(rows) if rows else x_MD
    torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)
    weight = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).view_as(exact)
    (actual * weight.to(dtype)).sum().backward()
    (exact * weight).sum().backward()
    for tensor, reference in zip(given, exact_in, strict=True):
        expected = torch.zeros_like(reference) if reference.grad is None else reference.grad
        torch.testing.assert_close(tensor.grad.double(), expected, rtol=tolerance, atol=tolerance)


def test_clamps_stop_gates_above_and_ups_on_both_sides() -> None:
    activation = ClampedSwiGLU(alpha=1.702, limit=7.0)
    gate, up = torch.tensor([9.0, -9.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 9.0, -9.0])
    gates, ups = torch.tensor([7.0, -9.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 7.0, -7.0])
    torch.testing.assert_close(activation(gate, up), (ups + 1) * gates * torch.sigmoid(1.702 * gates))


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
