"""Group-limited routing against its definition, token by token, and the precision of its correction bias."""

from __future__ import annotations

import math

import pytest
import torch

from automodel.backends import Backend
from automodel.moe.group_router import GroupLimitedRouter

HIDDEN, EXPERTS, TOP_K, GROUPS, TOP_GROUPS = 8, 12, 3, 4, 2


def router(
    *, normalize: bool = True, top_groups: int = TOP_GROUPS, bias: torch.Tensor | None = None
) -> GroupLimitedRouter:
    torch.manual_seed(0)
    made = GroupLimitedRouter(
        HIDDEN, EXPERTS, TOP_K, Backend(), num_groups=GROUPS, top_groups=top_groups, normalize=normalize, scale=2.5
    )
    torch.nn.init.normal_(made.weight)
    if bias is not None:
        made.e_score_correction_bias.copy_(bias)
    return made


def defined(made: GroupLimitedRouter, x: torch.Tensor) -> dict[int, float]:
    """Expert -> weight of one token, by the words of the paper."""
    scores = [1 / (1 + math.exp(-float(row @ x))) for row in made.weight.detach().double()]
    corrected = [score + float(bias) for score, bias in zip(scores, made.e_score_correction_bias, strict=True)]
    size = EXPERTS // GROUPS
    quality = [sum(sorted(corrected[g * size : (g + 1) * size])[-2:]) for g in range(GROUPS)]
    groups = sorted(range(GROUPS), key=lambda g: -quality[g])[: made.top_groups]
    allowed = [expert for expert in range(EXPERTS) if expert // size in groups]
    chosen = sorted(allowed, key=lambda expert: -corrected[expert])[:TOP_K]
    total = sum(scores[expert] for expert in chosen) if made.normalize else 1.0
    return {expert: made.scale * scores[expert] / total for expert in chosen}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("top_groups", [1, 2, GROUPS])
@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 0.5), (-2, -1)], ids=["no bias", "bias", "negative scores"])
def test_each_token_gets_the_experts_and_weights_of_the_definition(
    normalize: bool, top_groups: int, low: float, high: float
) -> None:
    bias = torch.empty(EXPERTS).uniform_(low, high, generator=torch.Generator().manual_seed(1))
    made = router(normalize=normalize, top_groups=top_groups, bias=bias)
    x_ND = torch.randn(40, HIDDEN)
    _, weight_NK, index_NK = made(x_ND)
    for x, weights, chosen in zip(x_ND.double(), weight_NK, index_NK, strict=True):
        expected = defined(made, x)
        assert set(chosen.tolist()) == set(expected)
        for expert, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
            assert weight == pytest.approx(expected[expert], rel=1e-5)


def test_groups_and_bias_change_the_choice_and_the_bias_no_weight() -> None:
    x_ND = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(3))
    _, _, free = router(top_groups=GROUPS)(x_ND)
    _, _, limited = router()(x_ND)
    assert (free.sort().values != limited.sort().values).any(-1).float().mean() > 0.1
    bias = torch.zeros(EXPERTS)
    bias[5] = 10.0
    logits, weight_NK, corrected = router(bias=bias, normalize=False)(x_ND)
    assert (corrected == 5).any(-1).all()
    torch.testing.assert_close(weight_NK, 2.5 * logits.sigmoid().gather(1, corrected))


def test_the_bias_decides_in_float32_whatever_the_dtype_of_the_model() -> None:
    # 0.5 and the next number are one number in BF16.
    bias = torch.full((EXPERTS,), 0.5)
    bias[7] = 0.5 + 2**-20
    made = router(bias=bias, top_groups=GROUPS).bfloat16()
    made.weight.data.zero_()
    logits, weights, chosen = made(torch.randn(4, HIDDEN).bfloat16())
    assert (made.weight.dtype, made.e_score_correction_bias.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(made.e_score_correction_bias, bias)
    assert (chosen[:, 0] == 7).all()
    assert (logits.dtype, weights.dtype, chosen.dtype) == (torch.float32, torch.float32, torch.int64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_bias_stays_float32_off_the_meta_device_too(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        made = GroupLimitedRouter(8, 4, 1, Backend(), num_groups=1, top_groups=1, normalize=True, scale=1.0)
    made = made.to(dtype)
    assert made.e_score_correction_bias.is_meta
    assert made.e_score_correction_bias.dtype == torch.float32
    made.to_empty(device="cpu")
    assert made.weight.dtype == dtype
    assert (made.e_score_correction_bias.dtype, made.e_score_correction_bias.device.type) == (torch.float32, "cpu")


def test_gradients_reach_the_weights_of_the_projection_and_nothing_else() -> None:
    made = router(bias=torch.rand(EXPERTS))
    x_ND = torch.randn(5, HIDDEN, requires_grad=True)
    _, weight_NK, _ = made(x_ND)
    weight_NK.square().sum().backward()
    assert made.weight.grad.abs().max() > 0
    assert x_ND.grad.abs().max() > 0
    assert not made.e_score_correction_bias.requires_grad
