"""What is called of TransformerEngine, by a stand-in on CPUs: values, gradients, and what keeps it from running."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from automodel.kernels import packages, te
from automodel.kernels.activations import SWIGLU
from automodel.kernels.experts import expert_mlp
from automodel.kernels.measured import by_speed, fp8_narrowest, fp8_rows
from automodel.kernels.te_linear import te_linear
from automodel.kernels.te_norm import te_rms_norm
from tests.automodel.te_stand_in import stand_in  # noqa: F401

ROWS, WIDE, NARROW = 256, 384, 128
CUDA = torch.device("cuda", 0)
# Relative errors of the output and of the gradients; those that TransformerEngine 2.20.2 had on an H200.
ERRORS = {"te": (1.7e-3, 1.7e-3), "fp8": (3.8e-2, 5.9e-2), "fp8_block": (3.8e-2, 3.8e-2)}
usefixtures = pytest.mark.usefixtures("stand_in")


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(torch.bfloat16).requires_grad_() for shape in shapes]


def exact(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@usefixtures
@pytest.mark.parametrize("kernel", ERRORS)
def test_linear_layers_err_as_much_as_was_measured(kernel: str) -> None:
    tensors = leaves((2, ROWS // 2, WIDE), (NARROW, WIDE), (NARROW,))
    doubles = exact(tensors)
    actual, expected = te_linear(*tensors, kernel), F.linear(*doubles)
    grad = torch.randn_like(actual)
    of_x, of_weight, of_bias = torch.autograd.grad(actual, tensors, grad)
    references = torch.autograd.grad(expected, doubles, grad.double())
    forward, backward = ERRORS[kernel]
    for value, reference, error in zip(
        (actual, of_x, of_weight), (expected, *references[:2]), (forward, backward, backward), strict=True
    ):
        assert 0.7 * error < relative(value, reference) < 1.3 * error
    assert relative(of_bias, references[2]) < 1e-2


@usefixtures
@pytest.mark.parametrize("frozen", [0, 1])
def test_only_wanted_gradients_are_computed(frozen: int) -> None:
    tensors = leaves((16, 32), (48, 32))
    tensors[frozen].requires_grad_(False)
    te_linear(*tensors, None, "fp8").sum().backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad.isfinite().all()


@usefixtures
def test_the_operations_obey_the_rules_of_torch() -> None:
    x, weight, bias = leaves((16, 32), (48, 32), (48,))
    torch.library.opcheck(torch.ops.automodel.te_linear.default, (x, weight, bias, "fp8"))
    torch.library.opcheck(torch.ops.automodel.te_rms_norm.default, (x, bias[:32].detach(), 1e-6, True))


@usefixtures
@pytest.mark.parametrize("zero_centred", [False, True])
def test_norms_round_once(zero_centred: bool) -> None:
    tensors = leaves((3, 5, 64), (64,))
    doubles = exact(tensors)
    actual = te_rms_norm(*tensors, 1e-6, zero_centred=zero_centred)
    expected = F.rms_norm(doubles[0], (64,), doubles[1] + zero_centred, 1e-6)
    grad = torch.randn_like(expected)
    mine = torch.autograd.grad(actual, tensors, grad.to(torch.bfloat16))
    for value, reference in zip(
        (actual, *mine), (expected, *torch.autograd.grad(expected, doubles, grad)), strict=True
    ):
        assert relative(value, reference) < 5e-3


@usefixtures
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("counts", [(3, 3, 3), (0, 7, 2), (0, 0, 0), ()], ids=str)
def test_experts_follow_the_reference_through_grouped_products(counts: tuple[int, ...], biases: bool) -> None:
    experts = len(counts)
    shapes = [(sum(counts), 16), (experts, 16, 16), (experts, 16, 8), (experts, 16), (experts, 16)]
    results = []
    for kernel in ("te", "torch"):
        tensors = leaves(*shapes[: 5 if biases else 3])
        x, gate_up, down, gate_up_bias, down_bias = (*tensors, None, None)[:5]
        options = {"gate_up_bias_E2F": gate_up_bias, "down_bias_ED": down_bias}
        out = expert_mlp(x, torch.tensor(counts, dtype=torch.int64), gate_up, down, kernel, SWIGLU, **options)
        grads = torch.autograd.grad(out.sum(), tensors, allow_unused=True)
        zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True))
        results.append((out, *zeros))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=2e-2, atol=2e-2)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert te.te_obstacle(torch.device("cpu"), torch.bfloat16) == "TransformerEngine needs CUDA"
    assert "float32" in te.te_obstacle(CUDA, torch.float32)
    monkeypatch.setattr(te, "is_installed", lambda _: False)
    assert te.te_obstacle(CUDA, torch.bfloat16) == "TransformerEngine is not installed"


@usefixtures
def test_another_cudnn_than_torchs_is_an_obstacle_to_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert te.te_attention_obstacle(CUDA, torch.bfloat16, 128) is None
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    import transformer_engine.pytorch

    monkeypatch.setattr(transformer_engine.pytorch, "get_cudnn_version", lambda: (9, 19, 0))
    obstacle = te.te_attention_obstacle(CUDA, torch.bfloat16, 128)
    assert "cuDNN 9.19.0 and torch 9.14.0: set CUDNN_HOME" in obstacle
    assert te.te_linear_obstacle("te", CUDA, torch.bfloat16) is None
    assert "not of 260" in te.te_attention_obstacle(CUDA, torch.bfloat16, 260)


@usefixtures
def test_an_older_release_and_one_that_cannot_be_imported_are_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(packages.metadata, "version", lambda _: "2.14.1+cu13")
        assert te.te_obstacle(CUDA, torch.bfloat16) == "TransformerEngine is not of release 2.20 or newer"
    te._import.cache_clear()
    packages._release.cache_clear()
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    assert "TransformerEngine cannot be imported" in te.te_obstacle(CUDA, torch.bfloat16)


@usefixtures
def test_fp8_that_the_device_lacks_is_an_obstacle_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert te.te_linear_obstacle("fp8", CUDA, torch.bfloat16) is None
    import transformer_engine.pytorch

    monkeypatch.setattr(
        transformer_engine.pytorch, "is_fp8_block_scaling_available", lambda **_: (False, "CUDA >= 12.9")
    )
    assert te.te_linear_obstacle("fp8_block", CUDA, torch.bfloat16) == "CUDA >= 12.9"


def test_fp8_pays_from_the_sizes_on_that_were_measured() -> None:
    assert fp8_rows("fp8", 4096, 12_288) == fp8_rows("fp8", 14_336, 4096) == 8192
    assert fp8_rows("fp8", 2048, 6144) == fp8_rows("fp8", 4096, 4096) == 16_384
    assert fp8_rows("fp8", 1024, 65_536) is None
    assert fp8_rows("fp8", 2048, 2048) is None
    assert fp8_narrowest("fp8") == "2048 x 6144 or 4096 x 4096"


def test_attention_kernels_are_in_the_order_of_their_times() -> None:
    assert by_speed("flash", "te", "flash4", "cudnn") == ["flash4", "te", "cudnn", "flash"]


def test_sizes_that_a_kernel_does_not_take_are_said() -> None:
    assert te.alignment_obstacle("fp8_block", 256, 128, 200) == "fp8_block takes multiples of 128, not 200"
    assert te.alignment_obstacle("te", 8, 16) is None
