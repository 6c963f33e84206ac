"""The head and its loss by chunks: the value and the gradients of torch's cross-entropy over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from automodel.kernels.cross_entropy import fused_loss_obstacle, linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, HIDDEN, VOCABULARY = 50, 24, 301


def problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN, device=DEVICE), torch.randn(VOCABULARY, HIDDEN, device=DEVICE)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device=DEVICE)
    labels[7:13] = -100
    divisor = torch.tensor(17, device=DEVICE)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, divisor


@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_value_and_gradients_do_not_depend_on_the_chunks(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels, divisor = problem(dtype)
    loss = linear_cross_entropy(hidden, weight, labels, divisor, chunk_bytes=rows * VOCABULARY * dtype.itemsize)
    (3 * loss).backward()
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = F.cross_entropy(exact_hidden @ exact_weight.T, labels, reduction="sum") / divisor
    (3 * exact).backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) < tolerance * exact.item()
    for actual, reference in ((hidden, exact_hidden), (weight, exact_weight)):
        assert actual.grad is not None
        assert actual.grad.dtype == dtype
        assert (actual.grad.double() - reference.grad).norm() < tolerance * reference.grad.norm()
    assert not hidden.grad[7:13].any()


def test_backward_may_come_twice() -> None:
    hidden, weight, labels, divisor = problem(torch.float32)
    loss = linear_cross_entropy(hidden, weight, labels, divisor)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, labels, divisor = problem(torch.float32)
    linear_cross_entropy(hidden, weight.requires_grad_(False), labels, divisor).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_the_kernel_writes_losses_and_gradients_of_rows_of_any_length() -> None:
    pytest.importorskip("triton")
    from automodel.kernels.triton_loss import softmax_gradient

    for vocabulary in (5, 4096, 4100):
        torch.manual_seed(0)
        logits = (torch.randn(4, vocabulary, device=DEVICE) * 20).requires_grad_()
        labels = torch.tensor([0, -100, vocabulary - 1, 2], device=DEVICE)
        exact = F.cross_entropy(logits.double(), labels, reduction="none")
        (exact.sum() / 3).backward()
        written, losses = logits.detach().clone(), torch.empty(4, device=DEVICE)
        softmax_gradient(written, labels, losses, torch.tensor(3.0, device=DEVICE), -100)
        torch.testing.assert_close(losses, exact.float().detach())
        torch.testing.assert_close(written, logits.grad)


def test_the_obstacle_on_cpu_is_named() -> None:
    assert "CUDA" in (fused_loss_obstacle(torch.device("cpu")) or "")
