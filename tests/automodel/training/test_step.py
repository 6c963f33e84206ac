"""A step has one loss and one gradient, however the global batch is split into processes and micro-batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from automodel.parallel.fsdp import parallelize
from automodel.parallel.mesh import MeshConfig, ParallelMesh, data_parallel
from automodel.training.data import IGNORED, Batch
from automodel.training.fused_adamw import FusedAdamW
from automodel.training.optimizer import OptimizerConfig, build_optimizer
from automodel.training.step import train_step
from ckpt_tools.core.errors import CkptError
from tests.automodel.ranks import run_ranks
from tests.automodel.tiny import batch as token_ids
from tests.automodel.tiny import moe_config, moe_model

ROWS = 8


def uneven_batch() -> Batch:
    """8 rows of which some have many ignored labels, so that a mean of means would be wrong."""
    tokens = token_ids(ROWS)
    labels = tokens.clone()
    for row in range(ROWS):
        labels[row, : row + 2] = IGNORED
    return Batch(tokens, torch.arange(tokens.shape[1]).expand_as(tokens).contiguous(), labels)


def steps(mesh_config, micro_batch: int, sync_last: bool = False, count: int = 3):
    """Loss, norm and tokens of some steps."""
    built = mesh_config.build()
    mesh = ParallelMesh.of(built) if built is not None else None
    model = moe_model().train()
    parallelize(model, mesh)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    whole = uneven_batch()
    rank, size = data_parallel(built)
    share = ROWS // size
    batches = [
        Batch(*(t[start : start + micro_batch] for t in (whole.input_ids, whole.position_ids, whole.labels)))
        for start in range(rank * share, (rank + 1) * share, micro_batch)
    ]
    results = []
    for _ in range(count):
        results.append(train_step(model, optimizer, batches, mesh, max_grad_norm=0.3, sync_last=sync_last))
    return [(r.loss, r.grad_norm, r.tokens) for r in results]


def test_the_loss_is_a_mean_over_all_target_tokens():
    model, whole = moe_model(), uneven_batch()
    with torch.no_grad():
        logits = model(whole.input_ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), whole.labels[:, 1:].flatten(), ignore_index=IGNORED)
    loss, _, tokens = steps(MeshConfig(), 8, count=1)[0]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert tokens == (whole.labels[:, 1:] != IGNORED).sum()


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_change_nothing(micro_batch):
    for got, expected in zip(steps(MeshConfig(), micro_batch), steps(MeshConfig(), 8), strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("world", "mesh"),
    [
        (2, MeshConfig(dp_shard=2)),
        (2, MeshConfig(dp_shard=1, ep=2)),
        (4, MeshConfig(dp_shard=2, ep=2)),
        (4, MeshConfig(dp_replicate=2, dp_shard=2)),
    ],
    ids=["fsdp2", "ep2", "fsdp2ep2", "hsdp"],
)
@pytest.mark.parametrize("sync_last", [False, True], ids=["sync every", "sync last"])
def test_processes_change_nothing(world, mesh, sync_last):
    expected = steps(MeshConfig(), 8)
    ranks = run_ranks(world, steps, mesh, 1, sync_last)
    assert all(rank == ranks[0] for rank in ranks), "ranks differ in loss or norm"
    for got, want in zip(ranks[0], expected, strict=True):
        assert got == pytest.approx(want, rel=1e-4)


def test_the_auxiliary_loss_of_the_router_does_not_grow_with_accumulation():
    def loss(micro_batch: int, coefficient: float) -> float:
        torch.manual_seed(0)
        model = moe_model(output_router_logits=True, router_aux_loss_coef=coefficient).train()
        whole = uneven_batch()
        parts = [
            Batch(*(t[i : i + micro_batch] for t in (whole.input_ids, whole.position_ids, whole.labels)))
            for i in range(0, ROWS, micro_batch)
        ]
        optimizer = build_optimizer(model, OptimizerConfig())
        return train_step(model, optimizer, parts, None, max_grad_norm=None).loss

    # Balance over a part of the batch is not balance over all of it, but of the same size.
    whole, parts = (loss(micro, 1.0) - loss(micro, 0.0) for micro in (8, 1))
    assert parts == pytest.approx(whole, rel=0.2)


def test_models_of_transformers_train_the_same_way():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(moe_config()).train()
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    whole = uneven_batch()
    losses = [train_step(model, optimizer, [whole], None, max_grad_norm=1.0).loss for _ in range(5)]
    assert losses[-1] < losses[0]


@pytest.fixture(params=[False, True], ids=["torch's AdamW", "fused AdamW"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the optimizer of CUDA, whose kernel Triton's interpreter runs."""
    if request.param:
        pytest.importorskip("triton")
        monkeypatch.setattr("automodel.training.optimizer.can_fuse", lambda _: True)
    return request.param


@pytest.mark.parametrize("max_grad_norm", [0.3, None])
def test_steps_of_the_fused_optimizer_are_those_of_torchs(
    monkeypatch: pytest.MonkeyPatch, max_grad_norm: float | None
) -> None:
    pytest.importorskip("triton")
    found = []
    for fuse in (False, True):
        monkeypatch.setattr("automodel.training.optimizer.can_fuse", lambda _, fuse=fuse: fuse)
        model = moe_model().train()
        optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
        assert isinstance(optimizer, FusedAdamW) == fuse
        results = [train_step(model, optimizer, [uneven_batch()], None, max_grad_norm=max_grad_norm) for _ in range(3)]
        found.append([number for r in results for number in (r.loss, r.grad_norm, r.tokens)])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def states(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    values = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *values)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_stops_before_the_update(fused: bool, value: float):
    model = moe_model().train()
    optimizer = build_optimizer(model, OptimizerConfig())
    assert isinstance(optimizer, FusedAdamW) == fused
    train_step(model, optimizer, [uneven_batch()], None, max_grad_norm=1.0)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = value
    before = states(model, optimizer)
    with pytest.raises(CkptError, match="gradient norm is"):
        train_step(model, optimizer, [uneven_batch()], None, max_grad_norm=1.0)
    for now, was in zip(states(model, optimizer), before, strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


def test_a_batch_without_targets_is_refused(fused: bool):
    whole = uneven_batch()
    empty = Batch(whole.input_ids, whole.position_ids, torch.full_like(whole.labels, IGNORED))
    model = moe_model()
    optimizer = build_optimizer(model, OptimizerConfig())
    assert isinstance(optimizer, FusedAdamW) == fused
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(CkptError, match="no token of the global batch"):
        train_step(model, optimizer, [empty], None, max_grad_norm=None)
    assert all(torch.equal(now, was) for now, was in zip(model.parameters(), before, strict=True))


def test_only_matrices_decay():
    model = moe_model()
    groups = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.3), name
