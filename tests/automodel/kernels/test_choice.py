"""The fused choice of experts against softmax and topk; without a GPU Triton's interpreter runs the kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from automodel.kernels.choice import choose_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(logits: torch.Tensor, top_k: int, over_chosen: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Equals in the order of their indices, as a stable sort has them."""
    ordered, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    if over_chosen:
        return ordered[:, :top_k].softmax(-1), indices[:, :top_k]
    return logits.softmax(-1).gather(1, indices[:, :top_k]), indices[:, :top_k]


@pytest.mark.parametrize("over_chosen", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(37, 128, 8), (5, 5, 3), (3, 60, 4), (2, 300, 10), (4, 1, 1)])
def test_weights_choices_and_gradients_are_the_references(
    over_chosen: bool, tokens: int, experts: int, top_k: int
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=DEVICE, requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    weights, indices = choose_experts(logits, top_k, torch.float32, over_chosen=over_chosen)
    expected, expected_indices = reference(exact, top_k, over_chosen)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-7)
    grad = torch.randn_like(weights)
    (weights * grad).sum().backward()
    (expected * grad).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_of_equals_the_first_is_chosen_and_rows_of_infinities_have_choices() -> None:
    logits = torch.zeros(3, 6, device=DEVICE)
    logits[0, 4] = 1.0
    logits[1] = float("-inf")
    logits[1, 2] = 0.0
    logits[2, 3] = float("nan")
    weights, indices = choose_experts(logits, 3, torch.float32, over_chosen=True)
    assert indices.tolist() == [[4, 0, 1], [2, 0, 1], [3, 0, 1]]
    assert weights[1].tolist() == [1.0, 0.0, 0.0]
    assert weights[2].isnan().any()


def test_half_precision_is_rounded_once_and_no_tokens_are_no_choices() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 16, device=DEVICE).half().requires_grad_()
    weights, _ = choose_experts(logits, 4, torch.float16, over_chosen=True)
    expected, _ = reference(logits.detach().double(), 4, True)
    assert torch.equal(weights, expected.half())
    weights.sum().backward()
    assert logits.grad.dtype == torch.float16
    empty, none = choose_experts(logits[:0], 4, torch.float16, over_chosen=True)
    assert (empty.shape, none.shape) == ((0, 4), (0, 4))


def test_the_operation_obeys_the_rules_of_torch() -> None:
    logits = torch.randn(6, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.automodel.choose_experts.default, (logits, 2, torch.float32, True))
