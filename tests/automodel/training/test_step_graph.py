"""Micro-batches as CUDA graphs. Without a GPU, what is recorded is a stand-in that runs again where it would replay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from automodel.training import step_graph as module
from automodel.training.data import Batch
from automodel.training.step import step_graph, train_step
from automodel.training.step_graph import StepGraph, graph_obstacle
from tests.automodel.tiny import VOCABULARY, moe_model

ROWS, LENGTH = 2, 16


def a_model() -> torch.nn.Module:
    return moe_model().train()


def a_batch(seed: int, rows: int = ROWS, *, packed: bool = False) -> Batch:
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(LENGTH).remainder(LENGTH // 2 if packed else LENGTH)
    return Batch(ids, positions.expand(rows, -1), ids)


class Recorder:
    """Stands in for `capture`: a replay computes again and writes into the tensors of the first time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.captured = self.replayed = 0

    def __call__(
        self, run: Callable[[], torch.Tensor], trial: Callable[[], None] | None
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        self.captured += 1
        if trial is not None:
            run()
            trial()
        adds = self.parameters[0].grad is not None
        before = [p.grad.clone() if adds else None for p in self.parameters]
        loss = run()
        held = [p.grad for p in self.parameters]
        for kept, grad in zip(before, held, strict=True):
            grad.copy_(kept) if adds else grad.fill_(torch.nan)

        def replay() -> None:
            self.replayed += 1
            for p in self.parameters:
                p.grad = None
            loss.copy_(run())
            for p, grad in zip(self.parameters, held, strict=True):
                grad.copy_(grad + p.grad if adds else p.grad)
                p.grad = grad

        return loss, replay


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.nn.Module], Recorder]:
    def pretend(model: torch.nn.Module) -> Recorder:
        recorder = Recorder(model)
        monkeypatch.setattr(module, "capture", recorder)
        monkeypatch.setattr(module, "graph_obstacle", lambda _: None)
        return recorder

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
    assert recorder.captured == min(2, micro_batches)
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


def test_a_step_that_began_without_the_graph_ends_without_it(on_a_gpu) -> None:
    plain, graphed = a_model(), a_model()
    recorder = on_a_gpu(graphed)
    graph = step_graph(graphed, 2)
    mixed = [a_batch(1, packed=True), a_batch(2)]
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

    monkeypatch.setattr(module, "capture", fail)
    graph = step_graph(model, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = [train_step(model, optimizer, [a_batch(0)], None, max_grad_norm=None, graph=graph).loss for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert [r.message for r in caplog.records if "capturing failed" in r.message] == [
        "micro-batches run without CUDA graphs: capturing failed: operation not permitted when stream is capturing"
    ]


def test_on_cpu_the_reason_is_said() -> None:
    model = a_model()
    assert graph_obstacle(model) == "graphs need CUDA"
    batch = a_batch(0)
    graph = StepGraph(model, lambda *_: torch.tensor(1.0))
    assert graph.backward(batch, torch.tensor(1.0)) == 1.0
