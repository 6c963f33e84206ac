"""The fused experts against the reference loop in float64: outputs and every gradient.

On a machine without a GPU Triton's interpreter runs the kernels, in FP32, where Triton is installed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from transformers.activations import ACT2FN

from automodel.kernels.activations import SWIGLU, ClampedSwiGLU, Gated, GatedActivation, Ungated
from automodel.kernels.experts import expert_mlp
from automodel.kernels.fused_experts import fused_experts
from automodel.kernels.permute import combine_rows, rows_by_expert, sort_by_expert
from automodel.kernels.triton_rows import (
    activate_backward,
    activation_form,
    gather_rows,
    spread_rows,
    sum_by_expert,
    sum_rows,
)
from tests.automodel.kernels.quack_stand_in import installed_quack

on_gpu = torch.cuda.is_available()
DEVICE = "cuda" if on_gpu else "cpu"
DTYPE = torch.bfloat16 if on_gpu else torch.float32
TOLERANCE = 4e-2 if on_gpu else 1e-5
TOKENS, HIDDEN, EXPERTS, TOP_K = 37, 48, 5, 2


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((actual.double() - exact).norm() / exact.norm()).detach())


def inputs(width: int, *, biases: bool, parts: int = 2) -> list[torch.Tensor]:
    """Tokens, routing weights, gate and up, down, and the two biases or None."""
    torch.manual_seed(0)
    shapes = [(TOKENS, HIDDEN), (TOKENS, TOP_K), (EXPERTS, parts * width, HIDDEN), (EXPERTS, HIDDEN, width)]
    shapes += [(EXPERTS, parts * width), (EXPERTS, HIDDEN)] if biases else []
    return [torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    "activation",
    [SWIGLU, Gated(torch.nn.SiLU()), ClampedSwiGLU(1.702, 0.7), Ungated(ACT2FN["relu2"])],
    ids=["SwiGLU", "SiLU module", "clamped", "ungated"],
)
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("sorted_rows", [False, True], ids=["tokens", "sorted rows"])
def test_values_and_all_gradients_are_the_references(
    activation: GatedActivation | Ungated, biases: bool, width: int, sorted_rows: bool
) -> None:
    given = inputs(width, biases=biases, parts=1 if isinstance(activation, Ungated) else 2)
    exact_in = [tensor.detach().double().requires_grad_() for tensor in given]
    # One expert gets nothing.
    index_NK = torch.rand(TOKENS, EXPERTS - 1, device=DEVICE).topk(TOP_K).indices + 1
    order = sort_by_expert(index_NK, EXPERTS)

    x, weight, gate_up, down, gate_up_bias, down_bias = (*given, None, None)[:6]
    run = {"gate_up_bias_E2F": gate_up_bias, "down_bias_ED": down_bias}
    form = activation_form(activation)
    assert form is not None
    if sorted_rows:
        rows = rows_by_expert(x, order)
        weight_M = weight.flatten()[order.order_M]
        rows = fused_experts(rows, weight_M, order.counts_E, gate_up, down, form, **run)
        actual = rows[order.inverse_M].view(TOKENS, TOP_K, HIDDEN).sum(1)
    else:
        actual = fused_experts(x, weight, order.counts_E, gate_up, down, form, order=order, **run)

    x, weight, gate_up, down, gate_up_bias, down_bias = (*exact_in, None, None)[:6]
    run = {"gate_up_bias_E2F": gate_up_bias, "down_bias_ED": down_bias}
    rows = expert_mlp(rows_by_expert(x, order), order.counts_E, gate_up, down, "torch", activation, **run)
    exact = combine_rows(rows, weight, order)

    assert relative_error(actual, exact) < TOLERANCE
    towards = torch.randn_like(exact)
    (actual * towards.to(DTYPE)).sum().backward()
    (exact * towards).sum().backward()
    for tensor, reference in zip(given, exact_in, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == DTYPE
        assert relative_error(tensor.grad, reference.grad) < TOLERANCE, tensor.shape


@pytest.mark.skipif(on_gpu, reason="QuACK's own products run there, where they are installed")
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    "activation",
    [SWIGLU, ClampedSwiGLU(1.702, 0.7), Ungated(ACT2FN["relu2"])],
    ids=["SwiGLU", "clamped", "ungated"],
)
def test_quacks_products_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, biases: bool, activation: GatedActivation | Ungated
) -> None:
    order = sort_by_expert(torch.rand(TOKENS, EXPERTS - 1).topk(TOP_K).indices + 1, EXPERTS)
    gradients = []
    for obstacle in ("none here", None):
        monkeypatch.setattr("automodel.kernels.fused_experts.products_obstacle", lambda *_, found=obstacle: found)
        given = inputs(16, biases=biases, parts=1 if isinstance(activation, Ungated) else 2)
        x, weight, gate_up, down, *both = given
        names = dict(zip(("gate_up_bias_E2F", "down_bias_ED"), both, strict=False))
        with installed_quack():
            out = fused_experts(
                x, weight, order.counts_E, gate_up, down, activation_form(activation), order=order, **names
            )
            out.square().sum().backward()
        gradients.append([out.detach(), *(tensor.grad for tensor in given)])
    for quacks, torchs in zip(*gradients, strict=True):
        assert relative_error(quacks, torchs.double()) < 1e-5
        assert quacks.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gate_and_up_in_turn_have_the_same_gradients(dtype: torch.dtype) -> None:
    h, grad = torch.randn(9, 48, device=DEVICE).to(dtype), torch.randn(9, 24, device=DEVICE).to(dtype)
    weight, form = torch.rand(9, device=DEVICE), activation_form(SWIGLU)
    in_turn = torch.stack(h.chunk(2, -1), -1).flatten(1)
    expected = activate_backward(h, weight, grad, form)
    for made, want in zip(activate_backward(in_turn, weight, grad, replace(form, in_turn=True)), expected, strict=True):
        assert torch.equal(made, want)


def test_no_rows_at_all_leave_zero_gradients() -> None:
    _, _, gate_up, down = inputs(16, biases=False)
    form, counts = activation_form(SWIGLU), torch.zeros(EXPERTS, dtype=torch.int32, device=DEVICE)
    assert form is not None
    nothing = torch.zeros(0, HIDDEN, device=DEVICE, dtype=DTYPE, requires_grad=True)
    out = fused_experts(nothing, torch.zeros(0, device=DEVICE), counts, gate_up, down, form)
    out.sum().backward()
    assert nothing.grad is not None
    assert gate_up.grad is not None
    assert not gate_up.grad.any()
    assert not down.grad.any()


def test_other_activations_have_no_fused_form() -> None:
    assert activation_form(Gated(torch.nn.functional.gelu)) is None


def test_sums_over_a_token_are_wider_than_its_dtype() -> None:
    # 256 + 8 x 1 in BF16 would stay 256.
    rows = torch.ones(9, 16, device=DEVICE, dtype=torch.bfloat16)
    rows[0] = 256
    total = sum_rows(rows, torch.arange(9, device=DEVICE), 9)
    assert (total == 264).all()


@pytest.mark.parametrize("columns", [1, 48, 3000])
def test_rows_are_gathered_and_spread_as_by_indexing(columns: int) -> None:
    x = torch.randn(21, columns, device=DEVICE)
    index = torch.randperm(63, device=DEVICE)
    assert torch.equal(gather_rows(x, index % 21), x[index % 21])
    spread = spread_rows(x, index, 3)
    assert torch.equal(spread[index], x.repeat_interleave(3, 0))


def test_rows_of_an_expert_are_summed_however_many_it_has() -> None:
    ends = torch.tensor([700, 700, 705], dtype=torch.int32, device=DEVICE)
    rows, weight = torch.randn(800, 24, device=DEVICE), torch.rand(800, device=DEVICE)
    parts = (rows * weight[:, None]).double()
    expected = torch.stack([parts[:700].sum(0), parts[700:700].sum(0), parts[700:705].sum(0)])
    torch.testing.assert_close(sum_by_expert(rows, ends, weight).double(), expected, rtol=1e-5, atol=1e-4)
