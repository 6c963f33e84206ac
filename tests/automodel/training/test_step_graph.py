"""Micro-batches as CUDA graphs. Without a GPU, what is recorded is a stand-in that runs again where it would replay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from automodel.parallel.fsdp import parallelize
from automodel.parallel.mesh import MeshConfig, ParallelMesh
from automodel.training import step_graph as module
from automodel.training.data import Batch
from automodel.training.optimizer import OptimizerConfig, build_optimizer
from automodel.training.step import step_graph, train_step
from automodel.training.step_graph import Place, StepGraph, graph_obstacle
from ckpt_tools.core.errors import CkptError
from tests.automodel.ranks import run_ranks
from tests.automodel.tiny import VOCABULARY, moe_model

ROWS, LENGTH = 2, 16


def a_model() -> torch.nn.Module:
    return moe_model().train()


def a_batch(seed: int, rows: int = ROWS, *, packed: bool = False) -> Batch:
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(LENGTH).remainder(LENGTH // 2 if packed else LENGTH)
    return Batch(ids, positions.expand(rows, -1), ids)


class Recorder:
    """Stands in for what records graphs: a replay computes again and writes into the tensors of the first time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.captured = self.replayed = 0

    def rehearse(self, run: Callable[[], torch.Tensor]) -> None:
        run()

    def shortage(self) -> str | None:
        return None

    def record(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        self.captured += 1
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        loss = run()
        held = [p.grad for p in self.parameters]
        for kept, grad in zip(before, held, strict=True):
            grad.fill_(torch.nan) if kept is None else grad.copy_(kept)

        def replay() -> None:
            self.replayed += 1
            for p in self.parameters:
                p.grad = None
            loss.copy_(run())
            for p, grad, kept in zip(self.parameters, held, before, strict=True):
                grad.copy_(p.grad if kept is None else grad + p.grad)
                p.grad = grad

        return loss, replay


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.nn.Module], Recorder]:
    def pretend(model: torch.nn.Module) -> Recorder:
        made = Recorder(model)
        monkeypatch.setattr(module, "recorder", lambda _: made)
        monkeypatch.setattr(module, "graph_obstacle", lambda _: None)
        return made

    return pretend


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_steps_from_a_graph_learn_the_same(on_a_gpu, micro_batches: int) -> None:
    steps = [[a_batch(10 * step + n) for n in range(micro_batches)] for step in range(6)]
    plain, graphed = a_model(), a_model()
    recorder = on_a_gpu(graphed)
    graph = step_graph(graphed, micro_batches)
    results = {}
    for model, used in ((plain, None), (graphed, graph)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        results[model] = [train_step(model, optimizer, s, None, max_grad_norm=1.0, graph=used) for s in steps]
    assert recorder.captured == micro_batches
    assert recorder.replayed > 0
    assert results[plain] == results[graphed]


def test_other_shapes_and_packed_rows_run_without_the_graph(on_a_gpu) -> None:
    batches = [a_batch(n) for n in range(5)] + [a_batch(7, rows=1), a_batch(8, packed=True), a_batch(9)]
    plain, graphed = a_model(), a_model()
    recorder = on_a_gpu(graphed)
    graph = step_graph(graphed, 1)
    losses = []
    for model, used in ((plain, None), (graphed, graph)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        losses.append([train_step(model, optimizer, [b], None, max_grad_norm=None, graph=used).loss for b in batches])
    assert losses[0] == losses[1]
    assert (recorder.captured, recorder.replayed) == (1, 3)


def test_a_step_with_rows_that_no_graph_takes_runs_wholly_without(on_a_gpu) -> None:
    plain, graphed = a_model(), a_model()
    recorder = on_a_gpu(graphed)
    graph = step_graph(graphed, 2)
    mixed = [a_batch(2), a_batch(1, packed=True)]
    for model, used in ((plain, None), (graphed, graph)):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(5):
            train_step(model, optimizer, [a_batch(3), a_batch(4)], None, max_grad_norm=None, graph=used)
        train_step(model, optimizer, mixed, None, max_grad_norm=None, graph=used)
    assert recorder.replayed == 6
    for mine, theirs in zip(graphed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_model_that_moved_is_captured_anew(on_a_gpu) -> None:
    model = a_model()
    recorder = on_a_gpu(model)
    graph = step_graph(model, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    step = partial(train_step, model, optimizer, mesh=None, max_grad_norm=None, graph=graph)
    for n in range(4):
        step([a_batch(n)])
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    step([a_batch(5)])
    assert recorder.captured == 2


def test_a_failed_capture_is_said_once_and_loses_no_gradient(on_a_gpu, monkeypatch, caplog) -> None:
    model = a_model()
    on_a_gpu(model)

    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Recorder, "record", fail)
    graph = step_graph(model, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = [train_step(model, optimizer, [a_batch(0)], None, max_grad_norm=None, graph=graph).loss for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert [r.message for r in caplog.records if "capturing failed" in r.message] == [
        "micro-batches run without CUDA graphs: capturing failed: operation not permitted when stream is capturing"
    ]


def test_a_closed_graph_is_made_anew(on_a_gpu) -> None:
    model = a_model()
    recorder = on_a_gpu(model)
    graph = step_graph(model, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for n in range(6):
        train_step(model, optimizer, [a_batch(n)], None, max_grad_norm=None, graph=graph)
        if n == 4:
            graph.close()
    assert recorder.captured == 2


def sharded_steps(mesh_config: MeshConfig, micro_batches: int, graphed: bool) -> tuple[list[float], int, int]:
    """Losses of 7 steps on this rank, and how often was captured and replayed; one rank has packed rows in step 5."""
    mesh = ParallelMesh.of(mesh_config.build())
    model = a_model()
    parallelize(model, mesh)
    made = Recorder(model)
    module.recorder, module.graph_obstacle = lambda _: made, lambda _: None
    graph = step_graph(model, micro_batches) if graphed else None
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    losses = []
    for step in range(7):
        seeds = [100 * step + 10 * mesh.data_rank + n for n in range(micro_batches)]
        batches = [a_batch(seed, packed=step == 4 and mesh.data_rank == 1) for seed in seeds]
        losses.append(train_step(model, optimizer, batches, mesh, max_grad_norm=1.0, graph=graph).loss)
    return losses, made.captured, made.replayed


@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [(MeshConfig(dp_shard=2), 1), (MeshConfig(dp_shard=2), 3), (MeshConfig(dp_shard=1, ep=2), 2)],
    ids=["fsdp", "fsdp, accumulating", "ep, accumulating"],
)
def test_sharded_models_learn_the_same_from_graphs_that_all_processes_replay(mesh, micro_batches) -> None:
    plain = run_ranks(2, sharded_steps, mesh, micro_batches, False)
    graphed = run_ranks(2, sharded_steps, mesh, micro_batches, True)
    eager = -(-3 // micro_batches) + 1  # the first steps, and the one in which one process had packed rows
    for (expected, *_), (losses, captured, replayed) in zip(plain, graphed, strict=True):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert captured == micro_batches
        assert replayed == (7 - eager) * micro_batches


def test_without_memory_for_a_graph_training_goes_on(on_a_gpu, monkeypatch, caplog) -> None:
    model = a_model()
    recorder = on_a_gpu(model)
    monkeypatch.setattr(Recorder, "shortage", lambda _: "a graph needs 9.0 GiB of its own, and 8.0 GiB are free")
    graph = step_graph(model, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = [train_step(model, optimizer, [a_batch(0)], None, max_grad_norm=None, graph=graph).loss for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert recorder.captured == 0
    assert "micro-batches run without CUDA graphs: a graph needs 9.0 GiB" in caplog.text


def test_a_capture_that_breaks_off_within_fsdp_is_an_error() -> None:
    for outcome in run_ranks(2, broken_off):
        assert outcome == "forward and backward cannot be captured: out of luck"


def broken_off() -> str:
    """What a rank says when captures end in the middle of a forward pass."""
    mesh = ParallelMesh.of(MeshConfig(dp_shard=2).build())
    model = a_model()
    parallelize(model, mesh)
    made = Recorder(model)
    module.recorder, module.graph_obstacle = lambda _: made, lambda _: None

    def break_off(*_: object) -> None:
        raise RuntimeError("out of luck")

    def record(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        model.model.layers[1].register_forward_pre_hook(break_off)
        return Recorder.record(made, run)

    made.record = record
    step = partial(train_step, model, torch.optim.SGD(model.parameters(), lr=1e-2), mesh=mesh, max_grad_norm=None)
    graph = step_graph(model, 1)
    for n in range(3):
        step([a_batch(n)], graph=graph)
    with pytest.raises(CkptError) as error:
        step([a_batch(3)], graph=graph)
    return str(error.value)


def test_on_cpu_the_reason_is_said() -> None:
    model = a_model()
    assert graph_obstacle(model) == "graphs need CUDA"
    batch = a_batch(0)
    graph = StepGraph(model, lambda *_, **__: torch.tensor(1.0))
    graph.begin([batch])
    assert graph.backward(batch, torch.tensor(1.0), Place(first=True, last=True)) == 1.0
