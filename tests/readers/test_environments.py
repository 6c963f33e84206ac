"""A reader's environment is found by its pins, and never taken for built before it is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.readers import environments


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Commands that a build ran, in a cache of its own; of them only `-m venv` does anything, and that little."""
    ran: list[tuple[str, ...]] = []

    def run(*command: str | Path) -> None:
        ran.append(tuple(map(str, command)))
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environments, "_run", run)
    return ran


def test_torch_is_installed_by_its_exact_pin_before_anything_else(commands: list[tuple[str, ...]]) -> None:
    environments.python_for("transformers4")
    (_, first, rest) = commands
    assert first[-1].startswith("torch==")
    assert rest[-2:] == ("--requirement", str(environments.HERE / "constraints-transformers4.txt"))


def test_a_built_environment_is_not_built_again(commands: list[tuple[str, ...]]) -> None:
    assert environments.python_for("transformers4", build=False) is None
    python = environments.python_for("transformers4")
    built = len(commands)
    assert environments.python_for("transformers4", build=False) == python
    assert environments.python_for("transformers4") == python
    assert len(commands) == built


def test_a_build_that_failed_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*command: str) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environments, "_run", fail)
    with pytest.raises(subprocess.CalledProcessError):
        environments.python_for("vllm")
    assert environments.python_for("vllm", build=False) is None


def test_an_unknown_reader_is_named() -> None:
    with pytest.raises(ValueError, match="no environment named vlm; there are transformers4, vllm, sglang"):
        environments.python_for("vlm")
