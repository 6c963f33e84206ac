"""Routing weights and the load-balancing loss."""

from __future__ import annotations

import pytest
import torch

from automodel.backends import Backend
from automodel.moe.router import TopKRouter, load_balancing_loss


def router(normalize: bool, float32_weights: bool = False) -> TopKRouter:
    torch.manual_seed(0)
    made = TopKRouter(8, 5, 3, Backend(), normalize=normalize, float32_weights=float32_weights)
    torch.nn.init.normal_(made.weight)
    return made


def test_the_largest_probabilities_are_chosen_in_order() -> None:
    made = router(normalize=False)
    logits, weights, chosen = made(torch.randn(7, 8))
    probabilities = logits.softmax(-1)
    expected, indices = probabilities.sort(-1, descending=True)
    assert torch.equal(chosen, indices[:, :3])
    torch.testing.assert_close(weights, expected[:, :3])


def test_normalised_weights_sum_to_one() -> None:
    _, weights, _ = router(normalize=True)(torch.randn(7, 8))
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))


def test_a_softmax_over_the_chosen_logits_includes_the_bias() -> None:
    made = TopKRouter(8, 5, 3, Backend(), normalize=False, bias=True, softmax_over_chosen=True)
    torch.nn.init.normal_(made.weight)
    made.bias.data = torch.tensor([9.0, 0.0, 0.0, 8.0, 0.0])
    x = torch.randn(7, 8) * 0.1
    logits, weights, chosen = made(x)
    torch.testing.assert_close(logits, x @ made.weight.T + made.bias)
    assert set(chosen[:, :2].flatten().tolist()) == {0, 3}
    torch.testing.assert_close(weights, logits.gather(1, chosen).softmax(-1))


@pytest.mark.parametrize(("float32_weights", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_the_dtype_of_the_weights_is_the_familys(float32_weights: bool, dtype: torch.dtype) -> None:
    made = router(True, float32_weights).bfloat16()
    logits, weights, chosen = made(torch.randn(4, 8).bfloat16())
    assert (logits.dtype, weights.dtype, chosen.dtype) == (torch.bfloat16, dtype, torch.int64)


def test_a_balanced_load_has_the_smallest_loss() -> None:
    balanced = torch.eye(4).repeat(3, 1) * 1e-3
    assert load_balancing_loss([balanced], top_k=1).item() == pytest.approx(1, abs=1e-3)
    collapsed = torch.tensor([[9.0, 0, 0, 0]]).repeat(12, 1)
    assert load_balancing_loss([collapsed], top_k=1).item() == pytest.approx(4, abs=0.01)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(8, 4), torch.randn(8, 4)]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    kept = [layer[mask.reshape(-1).bool()] for layer in logits]
    torch.testing.assert_close(load_balancing_loss(logits, 2, mask), load_balancing_loss(kept, 2))
