"""Sharded by FSDP2, layers on TransformerEngine take the gathered parameters, which stay what they were."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from automodel.models.qwen3_moe import NeMoQwen3MoeForCausalLM
from automodel.parallel.fsdp import parallelize
from automodel.parallel.grad_norm import global_grad_norm
from automodel.parallel.mesh import MeshConfig, MixedPrecision
from tests.automodel.ranks import run_ranks
from tests.automodel.te_stand_in import fp8_pays_for_small_layers, te_on_cpus
from tests.automodel.tiny import batch, moe_config

BACKENDS = ("torch", "te", {"sdpa": "te", "norm": "te", "experts": "te", "linear": "fp8"})


def steps() -> list[tuple[float, float, dict[str, torch.dtype]]]:
    """Loss, gradient norm and dtypes of the state, by each backend, of a model in FP32 that computes in BF16."""
    results = []
    for backend in BACKENDS:
        mesh = MeshConfig(dp_shard=2).build()
        torch.manual_seed(0)
        model = NeMoQwen3MoeForCausalLM(moe_config(), backend=backend)
        parallelize(model, mesh, mixed_precision=MixedPrecision(torch.bfloat16, torch.float32))
        rows = batch(8)[4 * torch.distributed.get_rank() :][:4]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        state = {name: value.dtype for name, value in model.state_dict().items()}
        results.append((loss.item(), global_grad_norm(model, mesh).item(), state))
    return results


def on_two_ranks() -> list[tuple[float, float, dict[str, torch.dtype]]]:
    with te_on_cpus() as patch:
        fp8_pays_for_small_layers(patch)
        return steps()


def test_losses_and_gradients_are_near_and_the_state_is_the_same() -> None:
    for (expected, expected_norm, reference), ours, fp8 in run_ranks(2, on_two_ranks):
        for (loss, norm, state), tolerance in ((ours, 1e-2), (fp8, 5e-2)):
            assert abs(loss - expected) < tolerance * expected
            assert abs(norm - expected_norm) < 5 * tolerance * expected_norm
            assert state == reference
        assert fp8[0] != ours[0]
