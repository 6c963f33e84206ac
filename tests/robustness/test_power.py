"""When the machine crashes, what was not synced may be lost: the output is still old, new or absent, and a rerun works.

The calls of a run are recorded once and played on a model of a disk (`disk.py`), whose power is cut after each of them;
of what was not synced everything, nothing or a random part survives.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt_tools.core.errors import OutputExistsError
from ckpt_tools.engine import journal
from ckpt_tools.engine.journal import JOURNAL
from tests.robustness.disk import Disk, Survives
from tests.robustness.scenarios import SCENARIOS, Scenario, Stage, Tree, counted_tasks, grow, staging_of, tree
from tests.robustness.shim import Call, Recorder

pytestmark = pytest.mark.usefixtures("small_segments", "sharing_disk", "fast_syncs")


def fates(cut: int, random_parts: int) -> list[Survives]:
    """What becomes of changes that were not synced: all survive, none, or any part of them."""
    found: list[Survives] = [lambda: True, lambda: False]
    for part in range(random_parts):
        generator = random.Random(f"{cut} {part}")
        share = generator.choice((0.1, 0.5, 0.9))
        found.append(lambda generator=generator, share=share: generator.random() < share)
    return found


def record(stage: Stage) -> tuple[Tree, list[Call]]:
    """What lay beside the source before the run, and its calls."""
    stage.reset()
    before = tree(stage.out.parent)
    recorder = Recorder()
    with stage.shim(recorder):
        stage.run()
    return before, recorder.calls


def state_in(content: Tree, stage: Stage) -> str:
    """Whether the output is absent, old or new."""
    found = {
        str(Path(name).relative_to(stage.out.name)): data
        for name, data in content.items()
        if Path(name).parts[0] == stage.out.name and len(Path(name).parts) > 1
    }
    if stage.out.name not in content:
        return "absent"
    found.pop(JOURNAL, None)
    assert found in (stage.old, stage.new), f"the output holds a part: {sorted(found)}"
    return "new" if found == stage.new else "old"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_the_recorded_calls_are_all_that_makes_an_output(tmp_path: Path, scenario: Scenario) -> None:
    stage = Stage(tmp_path, scenario)
    before, calls = record(stage)
    cloned = [path for call in calls if call.name == "clone" and not call.failed for path in call.paths]
    assert scenario.shares == any(Path(path).is_relative_to(staging_of(stage.out)) for path in cloned)
    disk = Disk(stage.out.parent, before)
    disk.play(calls)
    assert disk.content() == tree(stage.out.parent)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_a_power_cut_at_any_call_leaves_old_or_new_or_nothing(tmp_path: Path, scenario: Scenario, full: bool) -> None:
    stage = Stage(tmp_path, scenario)
    before, calls = record(stage)
    disk, states = Disk(stage.out.parent, before), []
    for cut in range(len(calls) + 1):
        states += [state_in(disk.after_cut(fate), stage) for fate in fates(cut, 50 if full else 5)]
        disk.play(calls[cut : cut + 1])
    expected = {"old", "new"} if scenario.overwrite else {"absent", "new"}
    # Without an exchange in one step the output is absent for a moment, and the old one lies aside.
    assert set(states) == expected | (set() if scenario.exchanges else {"absent"})
    for fate in fates(0, 5):
        assert state_in(disk.after_cut(fate), stage) == "new", "what was reported as done was lost"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_after_a_power_cut_a_rerun_trusts_no_journal_and_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Scenario, full: bool
) -> None:
    stage = Stage(tmp_path, scenario)
    before, calls = record(stage)
    cuts = range(SCENARIOS.index(scenario) % 9, len(calls), 1 if full else 9)
    for cut in cuts:
        disk = Disk(stage.out.parent, before)
        disk.play(calls[:cut])
        for fate in fates(cut, 2 if full else 1)[1:]:
            stage.clear()
            stage.out.parent.rmdir()
            grow(stage.out.parent, disk.after_cut(fate))
            was = state_in(tree(stage.out.parent), stage)
            monkeypatch.setattr(journal, "boot_mark", lambda cut=cut: f"started again after {cut}")
            _rerun(stage, was)


def _rerun(stage: Stage, was: str) -> None:
    with counted_tasks() as count, stage.shim(Recorder()):
        if was == "new" and not stage.scenario.overwrite:
            with pytest.raises(OutputExistsError):
                stage.run()
        else:
            stage.run()
            assert was == "new" or count() == stage.tasks, "a journal from before the crash was trusted"
    assert stage.state() == "new"
    assert not (stage.out / JOURNAL).exists()
    assert stage.beside() == []


def test_directories_that_a_run_makes_above_its_output_survive(tmp_path: Path) -> None:
    stage = Stage(tmp_path, SCENARIOS[0])
    stage.clear()
    stage.out.parent.rmdir()
    # As if the run had made work/ and what is above it.
    recorder = Recorder()
    with stage.shim(recorder):
        stage.run()
    disk = Disk(tmp_path, {})
    disk.play([call for call in recorder.calls if _is_written(call, stage.out.parent)])
    left = disk.after_cut(lambda: False)
    assert state_in({name.removeprefix("work/"): data for name, data in left.items() if name != "work"}, stage) == "new"


def _is_written(call: Call, folder: Path) -> bool:
    return all(Path(path) == folder.parent or Path(path).is_relative_to(folder) for path in call.paths)


@pytest.mark.parametrize(
    "forgotten",
    [
        pytest.param(lambda call: call.name == "fsync" and call.paths[0].endswith(".safetensors"), id="files"),
        pytest.param(lambda call: call.name == "fsync" and call.paths[0].endswith("-staging"), id="directories"),
        pytest.param(lambda call: call.name == "fsync" and call.paths[0].endswith("work"), id="the rename"),
    ],
)
def test_the_model_of_the_disk_notices_a_sync_that_is_left_out(
    tmp_path: Path, forgotten: Callable[[Call], bool]
) -> None:
    stage = Stage(tmp_path, replace(SCENARIOS[1], overwrite=True))
    before, calls = record(stage)
    kept = [call for call in calls if not forgotten(call)]
    assert len(kept) < len(calls)
    disk = Disk(stage.out.parent, before)
    with pytest.raises(AssertionError):  # noqa: PT012
        for cut in range(len(kept) + 1):
            for fate in fates(cut, 5):
                state_in(disk.after_cut(fate), stage)
            disk.play(kept[cut : cut + 1])
        assert state_in(disk.after_cut(lambda: False), stage) == "new"
