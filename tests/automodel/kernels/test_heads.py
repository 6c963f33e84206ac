"""Norms and rotation of heads in one kernel, against the separate operations in FP64; without a GPU Triton's
interpreter runs it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from automodel.kernels.heads import fused_heads_obstacle, norm_and_rotate
from automodel.models.qwen3_moe import NeMoQwen3MoeForCausalLM
from automodel.models.rope import rotate
from tests.automodel.tiny import batch, moe_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


def reference(
    qkv: torch.Tensor, weights: list[torch.Tensor], tables: list[torch.Tensor], offset: float
) -> list[torch.Tensor]:
    query, key, value = qkv.split((qkv.shape[3] - 2, 1, 1), dim=3)
    cos, sin = (table[:, :, None, None] for table in tables)
    normed = [
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (weight + offset)
        for x, weight in zip((query, key), weights, strict=True)
    ]
    return [x.flatten(2, 3) for x in (*(rotate(x, cos, sin) for x in normed), value)]


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize(("groups", "heads", "size", "batches"), [(4, 8, 64, 2), (2, 1, 16, 1), (1, 5, 32, 2)], ids=str)
def test_results_and_all_gradients_are_the_references(
    groups: int, heads: int, size: int, batches: int, zero_centred: bool
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, groups, heads + 2, size, device=DEVICE, requires_grad=True)
    weights = [torch.randn(size, device=DEVICE, requires_grad=True) for _ in range(2)]
    tables = [torch.randn(batches, 5, size, device=DEVICE) for _ in range(2)]
    exact = [t.detach().double().requires_grad_() for t in (qkv, *weights)]
    made = norm_and_rotate(qkv, *weights, *tables, eps=EPS, zero_centred=zero_centred)
    expected = reference(exact[0], exact[1:], [table.double() for table in tables], float(zero_centred))
    for found, wanted in zip(made, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    towards = [torch.randn_like(found) for found in made]
    sum((found * to).sum() for found, to in zip(made, towards, strict=True)).backward()
    sum((found * to).sum() for found, to in zip(expected, towards, strict=True)).backward()
    for found, wanted in zip((qkv, *weights), exact, strict=True):
        torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4)


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 3, 2, 4, 32, device=DEVICE).bfloat16()
    weights = [torch.randn(32, device=DEVICE).bfloat16() for _ in range(2)]
    tables = [torch.randn(1, 3, 32, device=DEVICE).bfloat16() for _ in range(2)]
    made = norm_and_rotate(qkv, *weights, *tables, eps=EPS)
    expected = reference(qkv.double(), [w.double() for w in weights], [t.double() for t in tables], 0.0)
    for found, wanted in zip(made, expected, strict=True):
        assert found.dtype == torch.bfloat16
        # The interpreter cuts off where a GPU rounds.
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8 if DEVICE == "cuda" else 2**-7, atol=1e-4)
    assert torch.equal(made[2], qkv[:, :, :, 3])


def test_the_operation_obeys_the_rules_of_torch() -> None:
    qkv = torch.randn(1, 3, 2, 4, 16, device=DEVICE, requires_grad=True)
    weights = [torch.randn(16, device=DEVICE, requires_grad=True) for _ in range(2)]
    tables = [torch.randn(1, 3, 16, device=DEVICE) for _ in range(2)]
    torch.library.opcheck(torch.ops.automodel.norm_and_rotate.default, (qkv, *weights, *tables, EPS, 0.0))


def test_what_it_cannot_run_it_says() -> None:
    cuda = torch.device("cuda")
    assert fused_heads_obstacle(cuda, 128, 128) is None
    assert "need CUDA" in fused_heads_obstacle(torch.device("cpu"), 128, 128)
    assert "not 96" in fused_heads_obstacle(cuda, 96, 96)
    assert "all rotated" in fused_heads_obstacle(cuda, 128, 64)


def test_models_compute_the_same_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = NeMoQwen3MoeForCausalLM(moe_config(), {"norm": "fused", "layers": "eager"}).to(DEVICE).train()
    ids = batch(2).to(DEVICE)
    found = []
    for obstacle in ("none here", None):
        monkeypatch.setattr("automodel.models.attention.fused_heads_obstacle", lambda *_, told=obstacle: told)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for fused, separate in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(fused, separate, rtol=1e-3, atol=1e-5)
