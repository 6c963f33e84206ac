"""A run that is killed at any of its calls leaves the old output, the new one or none, and a rerun completes it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_tools.core.errors import OutputExistsError
from ckpt_tools.engine.journal import JOURNAL
from tests.robustness.scenarios import SCENARIOS, Scenario, Stage, counted_tasks, in_child
from tests.robustness.shim import TRANSFERS, Call, Killer, Recorder, When

QUICK = 5
"""In the quick suite every so many-th kill point is played, another first one in each scenario."""

pytestmark = pytest.mark.usefixtures("small_segments", "sharing_disk", "fast_syncs")


def kill_points(calls: list[Call]) -> Iterator[tuple[int, When]]:
    """Before and after each call, and in the middle of each write of more than a byte."""
    for number, call in enumerate(calls, 1):
        yield number, "before"
        if call.name in TRANSFERS and len(call.arguments[1]) > 1:
            yield number, "middle"
    yield len(calls), "after"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_a_kill_at_any_call_leaves_old_or_new_or_nothing_and_a_rerun_completes(
    tmp_path: Path, scenario: Scenario, full: bool
) -> None:
    stage = Stage(tmp_path, scenario)
    points = list(kill_points(_recorded(stage)))
    assert len(points) > 60
    chosen = points if full else points[SCENARIOS.index(scenario) % QUICK :: QUICK]
    states = {_kill_and_rerun(stage, number, when) for number, when in chosen}
    # Both sides of the commit were met, or the points were not where they should be.
    assert states == {"old" if scenario.overwrite else "absent", "new"}


def _recorded(stage: Stage) -> list[Call]:
    stage.reset()
    recorder = Recorder()
    with stage.shim(recorder):
        stage.run()
    assert stage.state() == "new"
    return recorder.changes


def _kill_and_rerun(stage: Stage, number: int, when: When) -> str:
    stage.reset()

    def run() -> None:
        with stage.shim(Killer(number, when)):
            stage.run()

    where = f"killed {when} call {number}"
    with counted_tasks() as count:
        assert in_child(run) == -9, where
        done = count()
    state = stage.state()
    committed = state == "new"
    unclean = (stage.out / JOURNAL).exists()
    with counted_tasks() as count:
        if committed and not stage.scenario.overwrite:
            with pytest.raises(OutputExistsError, match="exists"):
                stage.run()
        else:
            with stage.shim(Recorder()):
                stage.run()
        redone = count()
    assert stage.state() == "new", where
    assert not (stage.out / JOURNAL).exists(), where
    assert stage.beside() == [], where
    if unclean:
        assert redone == 0, f"{where}: all was done, and a rerun did {redone} segments again"
    elif not committed:
        assert redone <= stage.tasks - done + 1, f"{where}: {done} were done, and a rerun did {redone} of {stage.tasks}"
    return "old" if state == "absent" and stage.scenario.overwrite and not stage.scenario.exchanges else state


@pytest.mark.parametrize("seed", range(6))
def test_a_run_that_is_killed_again_and_again_goes_on_each_time(tmp_path: Path, seed: int) -> None:
    stage = Stage(tmp_path, SCENARIOS[seed])
    calls = len(_recorded(stage))
    generator, done = random.Random(seed), 0
    stage.reset()
    for kill in range(1, 6):
        number = generator.randrange(1, calls)

        def run(number: int = number) -> None:
            with stage.shim(Killer(number, "before")):
                stage.run()

        with counted_tasks() as count:
            code = in_child(run)
            done += count()
        assert done <= stage.tasks + kill, "segments were copied again that were done"
        if stage.state() == "new" or code != -9:
            break
    else:
        with stage.shim(Recorder()):
            stage.run()
    assert stage.state() in ("new", "old" if stage.scenario.overwrite else "new")
