"""Every native family learns the same on 1, 2 and 4 processes: loss, gradient norm and every gradient, in FP32.

One group of processes takes all families in turn, so that a family costs no start of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from automodel.models import NATIVE_MODELS
from automodel.parallel.mesh import MeshConfig
from tests.automodel.helpers import CONFIGS
from tests.automodel.parallel.test_fsdp import assert_same, step
from tests.automodel.ranks import run_ranks

FAMILIES = sorted(NATIVE_MODELS)
MESHES = {
    2: (MeshConfig(dp_shard=2), MeshConfig(dp_shard=1, ep=2)),
    4: (MeshConfig(dp_shard=4), MeshConfig(dp_shard=1, ep=4), MeshConfig(dp_shard=2, ep=2)),
}


def build(family: str) -> nn.Module:
    """A tiny model with the same random values on every process; no bias or sink stays zero, no norm one."""
    torch.manual_seed(0)
    model = NATIVE_MODELS[family](CONFIGS[family.removesuffix("_text")]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def has_experts(family: str) -> bool:
    return any(".experts." in name for name, _ in build(family).named_parameters())


def steps(cases: list[tuple[str, MeshConfig]]) -> list[Any]:
    return [step(partial(build, family), mesh) for family, mesh in cases]


@pytest.mark.parametrize("world", MESHES)
def test_every_native_family_learns_the_same_on_any_mesh(world: int) -> None:
    assert {family.removesuffix("_text") for family in FAMILIES} <= CONFIGS.keys()
    cases = [(f, mesh) for f in FAMILIES for mesh in MESHES[world] if mesh.ep == 1 or has_experts(f)]
    assert len(cases) > len(FAMILIES)
    single = {family: step(partial(build, family), MeshConfig()) for family in FAMILIES}
    ranks = run_ranks(world, steps, cases)
    for number, (family, mesh) in enumerate(cases):
        try:
            assert_same(single[family], [results[number] for results in ranks])
        except AssertionError as error:
            raise AssertionError(f"{family} on {mesh}: {error}") from error
