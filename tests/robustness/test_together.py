"""Several runs at once and one after another, with other plans and with signals: who wins, and what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tools import convert, verify
from ckpt_tools.core.errors import (
    LockedError,
    OutputExistsError,
)
from ckpt_tools.engine.staging import Staging
from tests.checkpoints import make_repository
from tests.robustness.scenarios import (
    Scenario,
    Stage,
    counted_tasks,
    ended,
    in_child,
    interruption,
    staging_of,
    tree,
)

LOCKED, EXISTS = LockedError.exit_code, OutputExistsError.exit_code


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
    with interruption(after=1):
        first.run()
    convert(other, first.out)
    assert tree(first.out) == tree(tmp_path / "expected")
    first.reset()
    with interruption(after=1):
        first.run()
    with interruption(after=1):
        convert(other, first.out, threads=1)
    with counted_tasks() as count:
        first.run()
    assert count() == first.tasks
    assert first.state() == "new"


def test_a_config_that_was_corrected_after_a_kill_is_not_mixed_with_what_was_copied_before(tmp_path: Path) -> None:
    """Names, shapes and files stay the same; the order of the heads in the fused projection does not."""
    source = make_repository(tmp_path / "source", "llama", num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    with interruption(after=20):
        convert(source, tmp_path / "out", threads=1)
    config = json.loads((source / "config.json").read_bytes())
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "fresh")
    convert(source, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    verify(tmp_path / "out", against=source)


def test_what_an_interrupted_removal_left_is_not_gone_on_with(tmp_path: Path) -> None:
    """A file of the staging directory is missing or too short, and its journal speaks of segments in it."""
    stage = Stage(tmp_path, Scenario("convert"))
    for damage in (os.unlink, lambda path: os.truncate(path, 5000)):
        stage.reset()
        with interruption(after=4):
            stage.run()
        damage(next(staging_of(stage.out).glob("*.distcp")))
        stage.run()
        assert stage.state() == "new"


SLOW = """
import sys, time
from ckpt_tools.engine import execute
run = execute.run_task
def slow(*arguments):
    time.sleep(0.05)
    print("copying", flush=True)
    return run(*arguments)
execute.run_task = slow
import signal
# A test run in the background of a shell inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from ckpt_tools.cli import main
main()
"""


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")]
)
def test_a_signal_ends_a_run_in_words_and_the_same_command_goes_on(
    tmp_path: Path, number: int, code: int, said: str
) -> None:
    stage = Stage(tmp_path, Scenario("convert"))
    stage.reset()
    command = [sys.executable, "-c", SLOW, "convert", str(tmp_path / "source"), str(stage.out), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    hint = "the same command again goes on where this one stopped"
    assert (process.returncode, stderr) == (code, f"error: {said}\nhint: {hint}\n")
    assert stage.state() == "absent"
    assert stage.beside() == [".out.ckpt-staging"]
    with counted_tasks() as count:
        convert(tmp_path / "source", stage.out)
    # The command had segments of the usual size, one for each of five tensors.
    assert count() < 5
    assert stage.beside() == []
