"""A training run from its config to its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from automodel.checkpoint import TrainState, latest_checkpoint, load_checkpoint, save_checkpoint, step_directory
from automodel.checkpoint.directory import checkpoints
from automodel.checkpoint.state import model_state, optimizer_state, rng_state
from automodel.logging import get_logger
from automodel.parallel.agree import raise_together
from automodel.parallel.mesh import AXES, ParallelMesh, data_parallel
from automodel.training.config import TrainingConfig, load_config
from automodel.training.data import PackedData, SampleOrder, open_tokens, tokenized
from automodel.training.export import export_model
from automodel.training.metrics import MetricsFile, Report, StepMetrics, max_memory_bytes, write_report
from automodel.training.model import Source, build_model, held_side, mixed_precision, open_source
from automodel.training.optimizer import build_optimizer
from automodel.training.processes import is_first, process_group, terminal_log
from automodel.training.schedule import lr_ratio
from automodel.training.step import StepResult, step_graph, train_step
from automodel.training.step_graph import StepGraph
from ckpt_tools.core.errors import OutputExistsError, UsageError

_logger = get_logger(__name__)


def run(config_path: str | Path, overrides: Sequence[str] = ()) -> Report:
    """Train as the config says, in this process or, under torchrun, together with the others.

    Args:
        config_path: YAML file; see `automodel.training.config`.
        overrides: `section.key=value` texts.

    Returns:
        The report, on every process.

    Raises:
        CkptError: the config, the data, the model or the machine is at fault; raised on all processes.
    """
    config = load_config(Path(config_path), overrides)
    with process_group(config.timeout_minutes) as device, terminal_log(is_first()):
        return Run(config, device).train()


@dataclass(frozen=True)
class Run:
    """One run on this process's device; `train` does everything."""

    config: TrainingConfig
    device: torch.device

    def train(self) -> Report:
        """Prepare, step, save, export."""
        config = self.config
        mesh = ParallelMesh.of(config.mesh.build(self.device.type), mixed_precision(config.model))
        order = SampleOrder(1, config.global_batch_size, config.seed, config.data.shuffle)
        order.check(mesh.world_size, config.micro_batch_size)
        with raise_together("preparing the run"):
            resume = self._resume_from()
            self._check_export()
            if is_first():
                config.output_dir.mkdir(parents=True, exist_ok=True)
            source = open_source(resume or config.model.source, None if resume else config.model.revision)
        data, fingerprint = self._data(source)
        order = replace(order, samples=len(data))
        torch.manual_seed(config.seed)
        model = build_model(config.model, source, mesh, self.device, values=resume is None)
        optimizer = build_optimizer(model, config.optimizer)
        state = TrainState(0, 0, config.seed, dist.get_world_size(), fingerprint)
        if resume is None:
            _seed_process(config.seed, mesh.data_rank, 0)
        else:
            state = self._load(resume, model, optimizer, state, mesh.data_rank)
        return _Loop(self, mesh, source, model, optimizer, data, order).run(state)

    def _resume_from(self) -> Path | None:
        choice, root = self.config.checkpoint.resume, self.config.output_dir
        if choice == "auto":
            return latest_checkpoint(root)
        if choice == "none":
            if found := checkpoints(root):
                raise OutputExistsError(
                    f"{root} holds {len(found)} checkpoints of an earlier run",
                    hint="choose another output_dir, or checkpoint.resume=auto to go on",
                )
            return None
        return Path(choice)

    def _check_export(self) -> None:
        export = self.config.export_dir
        if export is not None and export.exists():
            raise OutputExistsError(f"export_dir {export} exists", hint="remove it or choose another one")

    def _data(self, source: Source) -> tuple[PackedData, str]:
        config = self.config.data
        cache = config.cache_dir or self.config.output_dir / "data-cache"
        with raise_together("preparing the data"):
            name = tokenized(config, source.tokenizer(), source.tokenizer_digest(), cache, write=is_first())
        with raise_together("opening the data"):
            return open_tokens(cache, name, config.seq_len), f"{name} seq_len={config.seq_len}"

    def _load(
        self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fresh: TrainState, rank: int
    ) -> TrainState:
        state = load_checkpoint(path, model, optimizer)
        if state.world_size != fresh.world_size:
            _seed_process(fresh.seed, rank, state.step)
        for what, was, now in (
            ("data", state.data_fingerprint, fresh.data_fingerprint),
            ("seed", state.seed, fresh.seed),
        ):
            if was != now and is_first():
                _logger.warning("%s was trained with another %s; the steps from here on use the new one", path, what)
        _logger.info("resumed from %s at step %d", path, state.step)
        return replace(fresh, step=state.step, tokens=state.tokens)


def _seed_process(seed: int, rank: int, step: int) -> None:
    """Random numbers of one process (dropout, router noise) from a step on; processes see different data."""
    torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0]))


@dataclass
class _Loop:
    """The steps of a run that is set up."""

    setup: Run
    mesh: ParallelMesh
    source: Source
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: PackedData
    order: SampleOrder

    @cached_property
    def graph(self) -> StepGraph | None:
        """What runs micro-batches as CUDA graphs, if the config wants it."""
        config = self.setup.config
        processes = data_parallel(self.mesh.root)[1]
        micro_batches = config.global_batch_size // config.micro_batch_size // processes
        return step_graph(self.model, micro_batches) if config.cuda_graphs == "auto" else None

    def run(self, state: TrainState) -> Report:
        config = self.setup.config
        if state.step > config.steps:
            raise UsageError(f"the checkpoint is at step {state.step}, beyond steps={config.steps}")
        metrics = MetricsFile(config.output_dir / "metrics.jsonl", state.step) if is_first() else None
        self.model.train()
        first_step, losses = state.step + 1, []
        saved: Path | None = None
        elapsed = 0.0
        while state.step < config.steps:
            started = time.perf_counter()
            lr = self._set_lr(state.step)
            result = self._step(state.step)
            state = replace(state, step=state.step + 1, tokens=state.tokens + result.tokens)
            seconds = time.perf_counter() - started
            elapsed += seconds
            losses.append(result.loss)
            if metrics is not None:
                measured = self._measured(state.step, result, lr, seconds)
                metrics.append(measured)
                _logger.info("%s", measured.line(config.steps))
            every, last = config.checkpoint.every, state.step == config.steps
            if (every and state.step % every == 0) or (last and config.checkpoint.at_end):
                saved = self._save(state)
        self._export()
        report = self._report(state, first_step, losses, elapsed, saved)
        if is_first():
            write_report(config.output_dir / "report.json", report)
            for line in report.lines():
                _logger.info("%s", line)
        return report

    def _step(self, step: int) -> StepResult:
        config = self.setup.config
        rank, size = data_parallel(self.mesh.root)
        samples = self.order.micro_batches(step, rank, size, config.micro_batch_size)
        return train_step(
            self.model,
            self.optimizer,
            [self.data.batch(numbers).to(self.setup.device) for numbers in samples],
            self.mesh,
            max_grad_norm=config.max_grad_norm,
            sync_last=config.sync_gradients == "last",
            graph=self.graph,
        )

    def _set_lr(self, step: int) -> float:
        config = self.setup.config
        lr = config.optimizer.lr * lr_ratio(step, config.steps, config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _measured(self, step: int, result: StepResult, lr: float, seconds: float) -> StepMetrics:
        inputs = self.order.global_batch_size * self.data.seq_len
        return StepMetrics(
            step=step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=result.tokens,
            tokens_per_second=inputs / seconds,
            seconds=seconds,
            max_memory_bytes=max_memory_bytes(),
        )

    def _save(self, state: TrainState) -> Path:
        config = self.setup.config
        path = step_directory(config.output_dir, state.step)
        tensors = {
            **model_state(self.model),
            **optimizer_state(self.model, self.optimizer),
            **rng_state(),
            "train_state.json": state.encode(),
        }
        save_checkpoint(
            path,
            tensors,
            family=self.source.family,
            side=held_side(self.model),
            side_files=self.source.side_files(),
            source={**self.source.origin, "step": str(state.step)},
            keep_last=config.checkpoint.keep_last,
        )
        if is_first():
            _logger.info("saved %s", path)
        return path

    def _export(self) -> None:
        export = self.setup.config.export_dir
        if export is not None:
            export_model(self.model, self.source, export)

    def _report(
        self, state: TrainState, first_step: int, losses: list[float], seconds: float, saved: Path | None
    ) -> Report:
        config = self.setup.config
        inputs = len(losses) * self.order.global_batch_size * self.data.seq_len
        return Report(
            first_step=first_step,
            steps=state.step,
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            tokens=state.tokens,
            seconds=seconds,
            tokens_per_second=inputs / seconds if seconds else 0.0,
            checkpoint=str(saved) if saved else None,
            export_dir=str(config.export_dir) if config.export_dir else None,
            model_class=type(self.model).__name__.removeprefix("FSDP"),
            mesh={axis: self.mesh.size(axis) for axis in AXES},
        )
