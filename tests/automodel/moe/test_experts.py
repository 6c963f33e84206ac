"""The experts layer: local routing, and what it asks of a dispatcher."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from automodel.backends import Backend
from automodel.kernels.activations import SWIGLU, ClampedSwiGLU, Ungated
from automodel.kernels.permute import combine_rows, rows_by_expert, sort_by_expert
from automodel.moe.experts import Experts

EXPERTS, HIDDEN, WIDTH = 5, 16, 8


class LoopbackDispatcher:
    """A dispatcher of one process, which records that it was asked."""

    gradient_scale = 0.25

    def __init__(self) -> None:
        self.calls: list[str] = []

    def dispatch(
        self, x_ND: torch.Tensor, index_NK: torch.Tensor, weight_NK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, object]:
        self.calls.append("dispatch")
        order = sort_by_expert(index_NK, EXPERTS)
        weight_M = None if weight_NK is None else weight_NK.flatten()[order.order_M]
        return rows_by_expert(x_ND, order), weight_M, order.counts_E, order

    def combine(self, rows_MD: torch.Tensor, weight_NK: torch.Tensor, state: object) -> torch.Tensor:
        self.calls.append("combine")
        return combine_rows(rows_MD, weight_NK, state)


def layer(backend: str = "auto", dtype: torch.dtype = torch.float32, bias: bool = False) -> Experts:
    torch.manual_seed(0)
    activation = ClampedSwiGLU(1.702, 0.5) if bias else SWIGLU
    made = Experts(EXPERTS, HIDDEN, WIDTH, activation, Backend.parse(backend), bias=bias)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    index_NK = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(11)])
    return torch.randn(11, HIDDEN, dtype=dtype), index_NK, torch.rand(11, 2, dtype=dtype)


@pytest.mark.parametrize(("backend", "dtype"), [("auto", torch.float32), ("torch", torch.float64)])
def test_each_token_gets_the_weighted_sum_of_its_experts(backend: str, dtype: torch.dtype) -> None:
    experts = layer(backend, dtype)
    x_ND, index_NK, weight_NK = batch(dtype)
    expected = torch.zeros(11, HIDDEN, dtype=torch.float64)
    for token in range(11):
        for expert, weight in zip(index_NK[token], weight_NK[token].double(), strict=True):
            gate, up = (experts.gate_up_proj[expert].double() @ x_ND[token].double()).chunk(2)
            expected[token] += weight * (experts.down_proj[expert].double() @ (F.silu(gate) * up))
    torch.testing.assert_close(experts(x_ND, index_NK, weight_NK).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "dtype"), [("auto", torch.float32), ("torch", torch.float64)])
def test_biases_are_the_experts_own_and_so_are_weighted_by_the_router(backend: str, dtype: torch.dtype) -> None:
    experts = layer(backend, dtype, bias=True)
    x_ND, index_NK, weight_NK = batch(dtype)
    expected = torch.zeros(11, HIDDEN, dtype=torch.float64)
    for token in range(11):
        for expert, weight in zip(index_NK[token], weight_NK[token].double(), strict=True):
            gate_up = experts.gate_up_proj[expert].double() @ x_ND[token].double() + experts.gate_up_proj_bias[expert]
            gate, up = gate_up[:WIDTH].clamp(max=0.5), gate_up[WIDTH:].clamp(-0.5, 0.5)
            middle = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            expected[token] += weight * (experts.down_proj[expert].double() @ middle + experts.down_proj_bias[expert])
    torch.testing.assert_close(experts(x_ND, index_NK, weight_NK).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_backends_agree_in_values_and_gradients(bias: bool) -> None:
    results = []
    for backend in ("torch", "grouped_mm"):
        experts = layer(backend, bias=bias)
        x_ND, index_NK, weight_NK = batch()
        inputs = [x_ND.requires_grad_(), weight_NK.requires_grad_(), *experts.parameters()]
        out = experts(x_ND, index_NK, weight_NK)
        out.square().sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_expert_that_no_token_chose_has_a_zero_gradient() -> None:
    experts = layer()
    experts(*batch()).sum().backward()
    assert not experts.gate_up_proj.grad[EXPERTS - 1].any()
    assert experts.gate_up_proj.grad[: EXPERTS - 1].flatten(1).any(1).all()


@pytest.mark.parametrize("bias", [False, True])
def test_experts_without_a_gate_have_one_projection_up(bias: bool) -> None:
    torch.manual_seed(0)
    experts = Experts(EXPERTS, HIDDEN, WIDTH, Ungated(F.relu), Backend(), bias=bias)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = ["up_proj", "down_proj", *(["up_proj_bias", "down_proj_bias"] if bias else [])]
    assert [name for name, _ in experts.named_parameters()] == names
    assert experts.up_proj.shape == (EXPERTS, WIDTH, HIDDEN)
    x_ND, index_NK, weight_NK = batch()
    expected = torch.zeros(11, HIDDEN)
    for token in range(11):
        for expert, weight in zip(index_NK[token], weight_NK[token], strict=True):
            up = experts.up_proj[expert] @ x_ND[token] + (experts.up_proj_bias[expert] if bias else 0)
            down = experts.down_proj[expert] @ F.relu(up) + (experts.down_proj_bias[expert] if bias else 0)
            expected[token] += weight * down
    torch.testing.assert_close(experts(x_ND, index_NK, weight_NK), expected, rtol=1e-5, atol=1e-5)


def test_a_dispatcher_carries_the_rows_and_scales_only_expert_gradients() -> None:
    local, remote = layer(bias=True), layer(bias=True)
    remote.dispatcher = LoopbackDispatcher()
    gradients = []
    for experts in (local, remote):
        x_ND, index_NK, weight_NK = batch()
        x_ND.requires_grad_()
        experts(x_ND, index_NK, weight_NK).square().sum().backward()
        gradients.append((x_ND.grad, *(parameter.grad for parameter in experts.parameters())))
    assert remote.dispatcher.calls == ["dispatch", "combine"]
    for scale, a, b in zip((1.0, 0.25, 0.25, 0.25, 0.25), *gradients, strict=True):
        torch.testing.assert_close(a * scale, b)
