"""Experts that are modules: one that has tokens on one process alone trains on all of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from automodel.parallel.expert_modules import give_every_expert_a_gradient
from automodel.parallel.fsdp import parallelize
from automodel.parallel.mesh import MeshConfig
from tests.automodel.ranks import run_ranks


class Experts(nn.Module):
    """Sends everything to one of its experts, and returns what transformers' blocks return."""

    def __init__(self, with_logits: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.with_logits = with_logits

    def forward(self, hidden: torch.Tensor, expert: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        out = self.experts[expert](hidden)
        return (out, out[..., :3]) if self.with_logits else out


class Layer(nn.Module):
    def __init__(self, with_logits: bool) -> None:
        super().__init__()
        self.mlp = Experts(with_logits)

    def forward(self, hidden: torch.Tensor, expert: int) -> torch.Tensor:
        out = self.mlp(hidden, expert)
        return hidden + (out[0] if isinstance(out, tuple) else out)


class Model(nn.Module):
    _no_split_modules = ["Layer"]

    def __init__(self, with_logits: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer = nn.Linear(4, 4), Layer(with_logits)

    def forward(self, hidden: torch.Tensor, expert: int) -> torch.Tensor:
        return self.layer(self.first(hidden), expert)


def gradients(with_logits: bool) -> dict[str, torch.Tensor]:
    """Of half the sum of two samples' losses, each of which uses another expert; the third one has none."""
    model = Model(with_logits)
    give_every_expert_a_gradient(model)
    if dist.is_initialized():
        parallelize(model, MeshConfig(dp_shard=2).build())
        rank = dist.get_rank()
        model(torch.full((1, 4), rank + 1.0), rank).square().sum().backward()
        return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    (sum(model(torch.full((1, 4), rank + 1.0), rank).square().sum() for rank in (0, 1)) / 2).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("with_logits", [False, True])
def test_two_processes_that_use_different_experts_agree_with_one(with_logits: bool) -> None:
    expected = gradients(with_logits)
    assert not any(expected[f"layer.mlp.experts.2.{kind}"].any() for kind in ("weight", "bias"))
    assert all(expected[f"layer.mlp.experts.{expert}.weight"].any() for expert in (0, 1))
    for found in run_ranks(2, gradients, with_logits):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)


def test_nothing_changes_where_no_gradient_is_wanted() -> None:
    model = Model(False)
    plain = model(torch.ones(1, 4), 1)
    give_every_expert_a_gradient(model)
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 4), 1), plain)
    model.layer.mlp.experts[0].requires_grad_(False)
    model(torch.ones(1, 4), 1).sum().backward()
    assert model.layer.mlp.experts[0].weight.grad is None
    assert not model.layer.mlp.experts[2].weight.grad.any()
