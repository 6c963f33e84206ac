"""The fused Mamba-2 kernels against the references, values and gradients; skipped without CUDA or the packages."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mamba_ssm")
pytest.importorskip("causal_conv1d")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BATCH, LENGTH, HEADS, GROUPS, HEAD_DIM, STATE = 2, 300, 8, 2, 64, 128


def gradients(made: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.linspace(-1, 1, made.numel(), device="cuda").view_as(made)
    return list(torch.autograd.grad((made.float() * weight).sum(), inputs))


def segments() -> torch.Tensor:
    begins = torch.zeros(BATCH, LENGTH, dtype=torch.bool, device="cuda")
    begins[0, 100] = begins[1, 128] = begins[1, 130] = True
    return begins.cumsum(-1)


@pytest.mark.parametrize("documents", [False, True])
def test_the_fused_scan_is_the_reference(documents: bool) -> None:
    from automodel.kernels.mamba import state_space_scan

    torch.manual_seed(0)
    shapes = [(BATCH, LENGTH, HEADS, HEAD_DIM), *[(BATCH, LENGTH, GROUPS, STATE)] * 2]
    x, into, out = (torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes)
    step = torch.rand(BATCH, LENGTH, HEADS, device="cuda").mul(0.2).requires_grad_()
    rate, skip = (torch.rand(HEADS, device="cuda").requires_grad_() for _ in range(2))
    inputs, segment = [x, step, rate, into, out, skip], segments() if documents else None
    found = []
    for kernel in ("torch", "fused"):
        y, state = state_space_scan(x, step, -rate.exp(), into, out, skip, 64, kernel, segment_BS=segment)
        found.append([y, state, *gradients(y, inputs)])
    for reference, fused in zip(*found, strict=True):
        assert (fused.float() - reference.float()).norm() < 0.02 * reference.float().norm()


@pytest.mark.parametrize("documents", [False, True])
def test_the_fused_convolution_is_the_reference(documents: bool) -> None:
    from automodel.kernels.mamba import causal_conv

    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in ((BATCH, LENGTH, 64), (64, 4), (64,))
    )
    segment, found = segments() if documents else None, []
    for kernel in ("torch", "fused"):
        y = causal_conv(x, weight, bias, kernel, segment)
        found.append([y, *gradients(y, [x, weight, bias])])
    for reference, fused in zip(*found, strict=True):
        assert (fused.float() - reference.float()).norm() < 0.02 * reference.float().norm()
