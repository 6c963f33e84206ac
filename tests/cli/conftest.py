"""A tiny repository, its native form, and a runner that sees what a shell would see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ckpt_tools import convert
from ckpt_tools.cli.app import app
from tests.checkpoints import make_repository


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Run = Callable[..., Ran]


@pytest.fixture
def ckpt() -> Run:
    """Runs the command in this process, as `ckpt("inspect", path)`."""

    def run(*arguments: object) -> Ran:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="ckpt")
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def shell(tmp_path: Path) -> Run:
    """Runs `python -m ckpt_tools` as a process of its own."""

    def run(*arguments: object, env: dict[str, str] | None = None) -> Ran:
        command = [sys.executable, "-m", "ckpt_tools", *(str(argument) for argument in arguments)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **(env or {})}
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        return Ran(result.returncode, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE repository of 74 kB; tests read it and do not change it."""
    return make_repository(tmp_path_factory.mktemp("cli") / "repository")


@pytest.fixture(scope="session")
def native(repository: Path) -> Path:
    """The same model as a native checkpoint."""
    destination = repository.parent / "native"
    convert(repository, destination)
    return destination
