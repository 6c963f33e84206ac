"""Several runs at once, inputs that change, outputs that are read-only, signals: who wins, who is told, what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert, verify
from ckpt_tools.core.errors import (
    InputChangedError,
    LockedError,
    NotFoundError,
    OutputExistsError,
    ResourceError,
    StorageError,
    UsageError,
)
from ckpt_tools.engine import copy, execute
from ckpt_tools.engine.staging import Staging
from tests.checkpoints import make_repository, tensor_bytes
from tests.robustness.scenarios import (
    SCENARIOS,
    Scenario,
    Stage,
    counted_tasks,
    ended,
    in_child,
    staging_of,
    tree,
)
from tests.robustness.shim import Killer, Recorder

LOCKED, EXISTS = LockedError.exit_code, OutputExistsError.exit_code
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_eight_runs_into_one_output_one_wins_and_the_others_are_told(tmp_path: Path, overwrite: bool) -> None:
    stage = Stage(tmp_path, Scenario("convert"))
    for _ in range(5):
        stage.reset()
        codes = Counter(_at_once(8, lambda: stage.run(overwrite=overwrite)))
        if overwrite:
            # Whoever comes after the winner replaces its output, with the same bytes.
            assert set(codes) <= {0, LOCKED}
        else:
            assert codes[0] == 1
            assert set(codes) <= {0, LOCKED, EXISTS}
        assert stage.state() == "new"
        assert stage.beside() == []


def _at_once(runs: int, act: Callable[[], object]) -> list[int]:
    """Exit codes of forked processes that begin together."""
    waiting, starting = os.pipe()
    children = []
    for _ in range(runs):
        child = os.fork()
        if child == 0:
            os.close(starting)
            os.read(waiting, 1)
            os._exit(in_child(act))
        children.append(child)
    os.close(waiting)
    os.close(starting)
    return [ended(child) for child in children]


def test_a_running_holder_keeps_others_out_and_a_dead_one_does_not(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Scenario("convert"))
    stage.reset()
    with Staging(stage.out):
        with pytest.raises(LockedError, match="another run is writing"):
            stage.run()
        assert in_child(stage.run) == LOCKED
    stage.run()
    assert stage.state() == "new"


def test_two_plans_into_one_output_are_not_mixed(tmp_path: Path) -> None:
    """The second begins anew in what an interrupted first one left, and so does the first after it."""
    first = Stage(tmp_path / "a", Scenario("convert"))
    other = make_repository(tmp_path / "other")
    convert(other, tmp_path / "expected")
    first.reset()
    _interrupted(first, 1)
    convert(other, first.out)
    assert tree(first.out) == tree(tmp_path / "expected")
    first.reset()
    _interrupted(first, 1)
    _interrupted(first, 1, lambda: convert(other, first.out, threads=1))
    with counted_tasks() as count:
        first.run()
    assert count() == first.tasks
    assert first.state() == "new"


def _interrupted(stage: Stage, after: int, run: Callable[[], object] | None = None) -> None:
    """Ends a run with Ctrl-C after some segments."""
    with pytest.MonkeyPatch.context() as patch:
        real, left = execute.run_task, [after]

        def dying(*arguments: object) -> object:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*arguments)  # type: ignore[arg-type]

        patch.setattr(execute, "run_task", dying)
        with pytest.raises(KeyboardInterrupt):
            (run or stage.run)()


def test_a_config_that_moves_elements_otherwise_starts_anew(tmp_path: Path) -> None:
    """Same names, shapes and files, another order of the heads: what the first plan copied is of no use."""
    source = make_repository(tmp_path / "source", num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    _interrupt_conversion(source, tmp_path / "out", after=30)
    config = json.loads((source / "config.json").read_bytes())
    # Four heads of 8 are two of 16, and two key heads of 8 are one of 16; norms of heads would not fit.
    swapped = {**config, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    shapes = {name: len(data) for name, data in tensor_bytes(source).items() if "_norm" in name and "self_attn" in name}
    assert shapes, "this family has no norms of heads; take another"
    twin = make_repository(
        tmp_path / "twin", **{k: swapped[k] for k in ("num_attention_heads", "num_key_value_heads")}, head_dim=16
    )
    assert copy.fingerprint(_plan_of(source), tmp_path / "out") != copy.fingerprint(_plan_of(twin), tmp_path / "out")


def _plan_of(source: Path) -> copy.Plan:
    from ckpt_tools.engine.checkpoint import open_checkpoint
    from ckpt_tools.engine.targets import plan_native

    return plan_native(open_checkpoint(source), mesh=None, file_format="dcp", dtype=None, max_file_size=1 << 30)


def _interrupt_conversion(source: Path, out: Path, *, after: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        real, left = execute.run_task, [after]

        def dying(*arguments: object) -> object:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*arguments)  # type: ignore[arg-type]

        patch.setattr(execute, "run_task", dying)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, threads=1)
