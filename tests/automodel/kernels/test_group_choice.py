"""The fused choice of DeepSeek V3's router against the one in torch; without a GPU Triton's interpreter runs it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from automodel.backends import Backend
from automodel.kernels.group_choice import choose_in_groups
from automodel.moe.group_router import GroupLimitedRouter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "no groups": (37, 128, 6, 1, 1),
    "groups": (21, 256, 8, 8, 4),
    "sizes that are no powers of two": (5, 30, 3, 3, 2),
    "all groups": (3, 24, 4, 4, 4),
    "one group, one choice": (4, 12, 1, 6, 1),
    "more choices than one group has": (6, 16, 6, 4, 2),
}
"""Tokens, experts, choices, groups, groups that are kept."""


def reference(
    logits: torch.Tensor, bias: torch.Tensor, top_k: int, groups: int, top_groups: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the router does in torch after its projection."""
    experts = logits.shape[1]
    made = GroupLimitedRouter(
        8,
        experts,
        top_k,
        Backend(router="torch"),
        num_groups=groups,
        top_groups=top_groups,
        normalize=normalize,
        scale=2.5,
    )
    made.e_score_correction_bias = bias
    scores = logits.sigmoid()
    index = made._choose(scores)
    weights = scores.gather(1, index)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-20) if normalize else weights) * 2.5, index


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_choices_and_gradients_are_the_references(
    case: tuple[int, int, int, int, int], normalize: bool
) -> None:
    tokens, experts, top_k, groups, top_groups = case
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=DEVICE, requires_grad=True)
    bias = torch.empty(experts, device=DEVICE).uniform_(-1, 1)
    exact = logits.detach().double().requires_grad_()
    weights, index = choose_in_groups(
        logits, bias, top_k, groups=groups, top_groups=top_groups, normalize=normalize, scale=2.5
    )
    expected, expected_index = reference(exact, bias.double(), top_k, groups, top_groups, normalize)
    assert torch.equal(index, expected_index)
    assert (weights.dtype, index.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-7)
    grad = torch.randn_like(weights)
    (weights * grad).sum().backward()
    (expected * grad).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_of_equals_the_first_is_chosen_and_nan_counts_as_the_largest() -> None:
    logits = torch.zeros(3, 8, device=DEVICE)
    logits[1, 6] = 1.0
    logits[2, 5] = float("nan")
    weights, index = choose_in_groups(
        logits, torch.zeros(8, device=DEVICE), 3, groups=2, top_groups=1, normalize=False, scale=1.0
    )
    assert index.tolist() == [[0, 1, 2], [6, 4, 5], [5, 4, 6]]
    assert weights[2].isnan().tolist() == [True, False, False]


def test_no_tokens_are_no_choices_and_the_operation_obeys_the_rules_of_torch() -> None:
    logits = torch.randn(6, 8, device=DEVICE, requires_grad=True)
    bias = torch.zeros(8, device=DEVICE)
    empty, none = choose_in_groups(logits[:0], bias, 2, groups=2, top_groups=1, normalize=True, scale=1.0)
    assert (empty.shape, none.shape) == ((0, 2), (0, 2))
    torch.library.opcheck(torch.ops.automodel.choose_in_groups.default, (logits, bias, 2, 2, 1, True, 2.5))
