"""A training run from its config to its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from automodel.checkpoint import Saver, TrainState, latest_checkpoint, load_checkpoint, save_checkpoint, step_directory
from automodel.checkpoint.directory import checkpoints
from automodel.checkpoint.state import (
    TRAIN_STATE_JSON,
    make_optimizer_state,
    model_state,
    optimizer_state,
    rng_state,
)
from automodel.logging import get_logger
from automodel.parallel.agree import is_first, raise_together
from automodel.parallel.mesh import AXES, ParallelMesh, data_parallel
from automodel.training.config import TrainingConfig, load_config
from automodel.training.data import PackedData, SampleOrder, open_tokens, tokenized
from automodel.training.export import export_model
from automodel.training.metrics import MetricsFile, Report, StepMetrics, max_memory_bytes, write_report
from automodel.training.model import Source, build_model, files_kept, held_side, mixed_precision, open_source
from automodel.training.optimizer import build_optimizer
from automodel.training.processes import process_group, terminal_log
from automodel.training.schedule import lr_ratio
from automodel.training.step import StepResult, step_graph, train_step
from automodel.training.step_graph import StepGraph
from automodel.training.termination import Termination
from ckpt_tools.core.errors import OutputExistsError, TerminatedError, UsageError

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
        # What a resumed run began from may be deleted while it goes on, as one checkpoint too many.
        with nullcontext(source) if resume is None else files_kept(source) as kept:
            return self._train(kept, resume, mesh, order)

    def _train(self, source: Source, resume: Path | None, mesh: ParallelMesh, order: SampleOrder) -> Report:
        config = self.config
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
class _Progress:
    """Where a run stands, and what this process has seen of it."""

    state: TrainState
    first_step: int
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    saved: Path | None = None

    def add(self, result: StepResult, seconds: float) -> TrainState:
        """Counts a step; where training stands after it."""
        self.state = replace(self.state, step=self.state.step + 1, tokens=self.state.tokens + result.tokens)
        self.losses.append(result.loss)
        self.seconds += seconds
        return self.state


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
        if config.cuda_graphs == "off":
            return None
        return step_graph(self.model, micro_batches, sync_last=config.sync_gradients == "last")

    def run(self, state: TrainState) -> Report:
        config = self.setup.config
        if state.step > config.steps:
            raise UsageError(f"the checkpoint is at step {state.step}, beyond steps={config.steps}")
        progress = _Progress(state, first_step=state.step + 1)
        timeout = timedelta(minutes=config.timeout_minutes)
        with Termination() as termination, Saver(config.checkpoint.async_save, self.setup.device, timeout) as saver:
            if self._saves_before_the_end(state.step):
                saver.reserve(self._tensors(state))
            try:
                self._take_steps(progress, saver, termination)
            finally:
                if self.graph is not None:
                    self.graph.close()
        self._export()
        report = self._report(progress)
        if is_first():
            write_report(config.output_dir / "report.json", report)
            for line in report.lines():
                _logger.info("%s", line)
        return report

    def _saves_before_the_end(self, step: int) -> bool:
        """Whether there will be steps after a save; nothing is gained by saving beside training otherwise."""
        every = self.setup.config.checkpoint.every
        return every > 0 and step // every < (self.setup.config.steps - 1) // every

    def _take_steps(self, progress: _Progress, saver: Saver, termination: Termination) -> None:
        config = self.setup.config
        # Before activations are scattered over the memory that their freed parts would leave between the states.
        make_optimizer_state(self.optimizer)
        metrics = MetricsFile(config.output_dir / "metrics.jsonl", progress.state.step) if is_first() else None
        self.model.train()
        while progress.state.step < config.steps:
            started = time.perf_counter()
            lr = self._set_lr(progress.state.step)
            result = self._step(progress.state.step, stop=termination.requested or saver.has_failed)
            seconds = time.perf_counter() - started
            state = progress.add(result, seconds)
            if metrics is not None:
                measured = self._measured(state.step, result, lr, seconds)
                metrics.append(measured)
                _logger.info("%s", measured.line(config.steps))
            if result.stop:
                self._stop(state, saver)
            every, last = config.checkpoint.every, state.step == config.steps
            if (every and state.step % every == 0) or (last and config.checkpoint.at_end):
                progress.saved = self._save(state, saver, wait=last)

    def _stop(self, state: TrainState, saver: Saver) -> NoReturn:
        """Ends the run because a process asked all to: its save has failed, or SIGTERM came to it."""
        saver.wait()
        config = self.setup.config.checkpoint
        saved = self._save(state, saver, wait=True) if config.every or config.at_end else None
        raise TerminatedError(
            f"ended by SIGTERM after step {state.step}",
            hint=f"the same command again resumes from {saved}" if saved else None,
        )

    def _step(self, step: int, *, stop: bool) -> StepResult:
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
            stop=stop,
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

    def _tensors(self, state: TrainState) -> dict[str, torch.Tensor]:
        """What a checkpoint holds."""
        return {
            **model_state(self.model),
            **optimizer_state(self.model, self.optimizer),
            **rng_state(),
            TRAIN_STATE_JSON: state.encode(),
        }

    def _save(self, state: TrainState, saver: Saver, *, wait: bool) -> Path:
        config = self.setup.config
        path, tensors = step_directory(config.output_dir, state.step), self._tensors(state)
        write = partial(
            save_checkpoint,
            path,
            tensors,
            family=self.source.family,
            side=held_side(self.model),
            side_files=self.source.side_files(),
            source={**self.source.origin, "step": str(state.step)},
            keep_last=config.checkpoint.keep_last,
        )
        saver.save(path, tensors, write, wait=wait)
        return path

    def _export(self) -> None:
        export = self.setup.config.export_dir
        if export is not None:
            export_model(self.model, self.source, export)

    def _report(self, progress: _Progress) -> Report:
        config, losses, seconds = self.setup.config, progress.losses, progress.seconds
        inputs = len(losses) * self.order.global_batch_size * self.data.seq_len
        return Report(
            first_step=progress.first_step,
            steps=progress.state.step,
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            tokens=progress.state.tokens,
            seconds=seconds,
            tokens_per_second=inputs / seconds if seconds else 0.0,
            checkpoint=str(progress.saved) if progress.saved else None,
            export_dir=str(config.export_dir) if config.export_dir else None,
            model_class=type(self.model).__name__.removeprefix("FSDP"),
            mesh={axis: self.mesh.size(axis) for axis in AXES},
        )
