"""The SonicMoE experts against the reference loop in float64: outputs and every gradient.

On a machine without a GPU a stand-in computes QuACK's products, and Triton's interpreter runs the sums, in FP32.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch

pytest.importorskip("triton")

from transformers.activations import ACT2FN

from automodel.kernels import measured
from automodel.kernels.activations import SWIGLU, ClampedSwiGLU, Gated, GatedActivation, Ungated
from automodel.kernels.experts import expert_mlp
from automodel.kernels.permute import combine_rows, rows_by_expert, sort_by_expert
from automodel.kernels.products import _configuration, products_obstacle
from automodel.kernels.sonic import sonic_experts, sonic_obstacle
from tests.automodel.kernels.quack_stand_in import GemmConfig, Products, installed_quack

on_gpu = torch.cuda.is_available()
DEVICE = "cuda" if on_gpu else "cpu"
DTYPE = torch.bfloat16 if on_gpu else torch.float32
TOLERANCE = 2 * torch.finfo(DTYPE).eps if on_gpu else 1e-5
TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 37, 48, 24, 5, 2
if on_gpu:
    pytest.importorskip("quack")


@pytest.fixture(autouse=True)
def products() -> Iterator[Products | None]:
    with nullcontext() if on_gpu else installed_quack() as products:
        yield products


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((actual.double() - exact).norm() / exact.norm()).detach())


def inputs(parts: int = 2, tokens: int = TOKENS) -> list[torch.Tensor]:
    """Tokens, routing weights, gate and up, and down."""
    torch.manual_seed(0)
    shapes = [(tokens, HIDDEN), (tokens, TOP_K), (EXPERTS, parts * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)]
    return [torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    "activation", [SWIGLU, Gated(torch.nn.SiLU()), Ungated(ACT2FN["relu2"])], ids=["SwiGLU", "SiLU module", "ungated"]
)
@pytest.mark.parametrize("sorted_rows", [False, True], ids=["tokens", "sorted rows"])
def test_values_and_all_gradients_are_the_references(activation: GatedActivation | Ungated, sorted_rows: bool) -> None:
    given = inputs(parts=1 if isinstance(activation, Ungated) else 2)
    exact_in = [tensor.detach().double().requires_grad_() for tensor in given]
    # One expert gets nothing.
    index_NK = torch.rand(TOKENS, EXPERTS - 1, device=DEVICE).topk(TOP_K).indices + 1
    order = sort_by_expert(index_NK, EXPERTS)

    x, weight, gate_up, down = given
    if sorted_rows:
        weight_M = weight.flatten()[order.order_M]
        rows = sonic_experts(rows_by_expert(x, order), weight_M, order.counts_E, gate_up, down, activation)
        actual = rows[order.inverse_M].view(TOKENS, TOP_K, HIDDEN).sum(1)
    else:
        actual = sonic_experts(x, weight, order.counts_E, gate_up, down, activation, order=order)

    x, weight, gate_up, down = exact_in
    rows = expert_mlp(rows_by_expert(x, order), order.counts_E, gate_up, down, "torch", activation)
    exact = combine_rows(rows, weight, order)

    assert relative_error(actual, exact) < TOLERANCE
    towards = torch.randn_like(exact)
    (actual * towards.to(DTYPE)).sum().backward()
    (exact * towards).sum().backward()
    for tensor, reference in zip(given, exact_in, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == DTYPE
        assert tensor.grad.is_contiguous()
        assert relative_error(tensor.grad, reference.grad) < TOLERANCE, tensor.shape
    assert not given[2].grad[0].any()
    assert not given[3].grad[0].any()


@pytest.mark.parametrize("experts", [EXPERTS, 0], ids=["some experts", "no experts"])
def test_no_rows_at_all_leave_zero_gradients(experts: int) -> None:
    gate_up, down = (tensor[:experts].detach().requires_grad_() for tensor in inputs()[2:])
    counts = torch.zeros(experts, dtype=torch.int32, device=DEVICE)
    nothing = torch.zeros(0, HIDDEN, device=DEVICE, dtype=DTYPE, requires_grad=True)
    sonic_experts(nothing, torch.zeros(0, device=DEVICE), counts, gate_up, down, SWIGLU).sum().backward()
    assert nothing.grad is not None
    assert gate_up.grad is not None
    assert not gate_up.grad.any()
    assert not down.grad.any()


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same() -> None:
    x, weight, gate_up, down = inputs()
    order = sort_by_expert(torch.rand(TOKENS, EXPERTS, device=DEVICE).topk(TOP_K).indices, EXPERTS)
    run = (x, weight, order.counts_E, gate_up, down, SWIGLU)
    with torch.no_grad():
        alone = sonic_experts(*run, order=order)
    assert torch.equal(alone, sonic_experts(*run, order=order))


def test_few_shapes_are_met_however_many_rows_come(products: Products | None) -> None:
    if products is None:
        pytest.skip("the stand-in counts them")
    _, _, gate_up, down = inputs()
    for rows in (33, 34, 63, 64):
        x = torch.zeros(rows, HIDDEN, requires_grad=True)
        counts = torch.tensor([0, rows - 3, 0, 3, 0])
        sonic_experts(x, torch.ones(rows), counts, gate_up, down, SWIGLU).sum().backward()
    assert {shape[0] for shape, _ in products.shapes} == {34, 64}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"device": torch.device("cpu")}, "need CUDA"),
        ({"dtype": torch.float32}, "not float32"),
        ({"activation": ClampedSwiGLU(1.702, 7.0)}, "no activation ClampedSwiGLU"),
        ({"activation": Ungated(torch.nn.functional.gelu)}, "no activation Ungated"),
        ({"bias": True}, "without biases"),
        ({"width": 100}, "expert width 100"),
    ],
)
def test_what_it_cannot_run_it_says(changed: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("automodel.kernels.products.is_installed", lambda _: True)
    monkeypatch.setattr("automodel.kernels.products.is_at_least", lambda _, *release: release <= (0, 6, 5))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    asked = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "hidden": 64, "width": 64, "activation": SWIGLU}
    assert sonic_obstacle(**asked) is None
    assert said in sonic_obstacle(**{**asked, **changed})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "compute capability 9.0" in sonic_obstacle(**asked)


@pytest.mark.parametrize(
    ("release", "runs"), [((0, 6, 1), False), ((0, 6, 2), True), ((0, 6, 9), True), ((0, 7), False)]
)
def test_quack_runs_in_releases_whose_products_are_known(
    monkeypatch: pytest.MonkeyPatch, release: tuple[int, ...], runs: bool
) -> None:
    monkeypatch.setattr("automodel.kernels.products.is_installed", lambda _: True)
    monkeypatch.setattr("automodel.kernels.products.is_at_least", lambda _, *asked: release[: len(asked)] >= asked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    obstacle = products_obstacle(torch.device("cuda"), torch.bfloat16, 64, 64)
    assert (obstacle is None) == runs
    assert runs or "0.6.2" in obstacle


@pytest.mark.skipif(on_gpu, reason="the stand-in has these configurations")
@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_products_are_cut_as_measured_on_gpus_like_the_measured_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = _configuration(torch.device("cuda"))
    assert (found is None) == (capability != (9, 0))
    assert found is None or (found.tile_m, found.tile_n) == measured.TILE[:2]


def test_quack_has_the_arguments_of_its_stand_in() -> None:
    if not on_gpu:
        pytest.skip("needs QuACK itself")
    from quack import gemm_config
    from quack.gemm_interface import gemm, gemm_act, gemm_dact, gemm_tuned

    functions = {"gemm": gemm, "gemm_tuned": gemm_tuned.fn, "gemm_act": gemm_act, "gemm_dact": gemm_dact}
    for name, theirs in functions.items():
        ours = inspect.signature(getattr(Products, name)).parameters
        assert set(ours) - {"self"} <= set(inspect.signature(theirs).parameters)
    assert {field.name for field in fields(GemmConfig)} <= {field.name for field in fields(gemm_config.GemmConfig)}
