"""Layers that scan, compiled around their kernels: the same values and gradients, alone and sharded by FSDP2.

The references stand in for the kernels, as calls that torch.compile leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from automodel import MeshConfig
from automodel.compat import TRANSFORMERS_5
from automodel.kernels import delta_rule, mamba
from automodel.models import NATIVE_MODELS, NativeCausalLM
from automodel.models import layer as layers
from automodel.parallel.fsdp import parallelize
from automodel.parallel.mesh import ParallelMesh
from tests.automodel.helpers import CONFIGS, relative, tokens
from tests.automodel.ranks import run_ranks

NAMES = ["qwen3_next", *(["nemotron_h"] if TRANSFORMERS_5 else [])]
Recorded = list[str]


def compile_with(patch: pytest.MonkeyPatch, backend: str) -> Recorded:
    """Layers go through torch.compile with a backend that needs no compiler; the kinds of those that do."""
    kinds: Recorded = []

    def compiled(kind: type[layers.Layer]) -> Callable[..., layers.LayerOutput]:
        run = torch.compile(kind._run, backend=backend)

        def record(self: layers.Layer, *inputs: object) -> layers.LayerOutput:
            kinds.append(self.kind)
            return run(self, *inputs)

        return record

    made = {}
    patch.setattr(layers, "_compiled", lambda kind: made.setdefault(kind, compiled(kind)))
    return kinds


def scan_by_stand_ins(patch: pytest.MonkeyPatch) -> None:
    conv, scan, rule = mamba.causal_conv, mamba.state_space_scan, delta_rule.gated_delta_rule
    stand_ins = {
        (mamba, "_fused_conv"): lambda x, w, b, s: conv(x, w, b, "torch", s),
        (mamba, "_fused_scan"): lambda *a: scan(*a[:7], "torch", initial_BHPN=a[7], segment_BS=a[8]),
        (delta_rule, "_fla"): lambda *a: rule(*a[:5], "torch", state_BHKV=a[5], document_BS=a[6]),
    }
    for (module, name), stand_in in stand_ins.items():
        patch.setattr(module, name, torch.compiler.disable(stand_in))
    patch.setattr("automodel.scan_backends.fused_mamba_obstacle", lambda *_: None)
    patch.setattr("automodel.scan_backends.fla_obstacle", lambda *_, **__: None)


def model(name: str, how: str) -> NativeCausalLM:
    torch.manual_seed(0)
    made = NATIVE_MODELS[name](CONFIGS[name](), backend={"layers": how})
    return made.float().train()


def learned(made: NativeCausalLM, packed: bool = False) -> list[torch.Tensor]:
    """The loss and all gradients of a batch."""
    ids = tokens(2, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1) if packed else None
    loss = made(ids, labels=ids, position_ids=positions, use_cache=False).loss
    loss.backward()
    gradients = [parameter.grad for parameter in made.parameters() if parameter.grad is not None]
    return [loss.detach(), *(grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in gradients)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_layers_compute_the_same_around_the_kernels_of_scans(
    monkeypatch: pytest.MonkeyPatch, name: str, packed: bool
) -> None:
    expected = learned(model(name, "eager"), packed)
    kinds = compile_with(monkeypatch, "aot_eager")
    # The loops of the references are not compiled.
    assert max(map(relative, learned(model(name, "compiled"), packed), expected)) < 1e-5
    assert kinds
    assert "linear_attention" not in kinds
    kinds.clear()
    scan_by_stand_ins(monkeypatch)
    made = model(name, "compiled")
    assert max(map(relative, learned(made, packed), expected)) < 1e-5
    assert kinds == list(made.model.spec.attention_kinds)


def _sharded(name: str, how: str) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        kinds = compile_with(patch, "eager")
        scan_by_stand_ins(patch)
        made = model(name, how)
        parallelize(made, ParallelMesh.of(MeshConfig(dp_shard=2).build()))
        results = learned(made)
        assert bool(kinds) == (how == "compiled")
    return results


@pytest.mark.parametrize("name", NAMES)
def test_compiled_layers_that_scan_compute_the_same_where_they_are_sharded(name: str) -> None:
    eager, compiled = (run_ranks(2, _sharded, name, how)[0] for how in ("eager", "compiled"))
    assert max(map(relative, compiled, eager)) < 1e-5
