"""The demos' recipes are valid, and a demo with a failed check ends with a non-zero exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from automodel.training.config import load_config
from examples.walkthrough import ROOT, Walkthrough, play

RECIPES = sorted((ROOT / "examples").glob("*/train.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_a_recipe_loads_and_its_data_are_there(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.mesh.sizes(world_size=2)["ep"] == 2
    assert all((ROOT / file).is_file() for file in config.data.files)


def test_a_walkthrough_in_which_all_passes_ends_with_zero(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def scenario(demo: Walkthrough) -> None:
        assert demo.run("say", sys.executable, "-c", "print('hello')") == "hello\n"

    assert play(Walkthrough("a demo", tmp_path), scenario) == 0
    shown = capfd.readouterr().out
    assert "-c 'print('\"'\"'hello'\"'\"')'" in shown
    assert "1 passed, 0 failed" in shown


def test_a_failed_check_is_remembered_and_the_rest_still_runs(tmp_path: Path) -> None:
    done = []

    def scenario(demo: Walkthrough) -> None:
        demo.check("two and two", False, "5")
        done.append("the rest")

    assert play(Walkthrough("a demo", tmp_path), scenario) == 1
    assert done


def test_nothing_runs_after_a_failed_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def scenario(demo: Walkthrough) -> None:
        demo.run("fail", sys.executable, "-c", "raise SystemExit(3)")
        raise AssertionError("the scenario went on")

    assert play(Walkthrough("a demo", tmp_path), scenario) == 1
    assert "exit code 3" in capfd.readouterr().out
