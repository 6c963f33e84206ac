"""`ckpt train` hands a config to the training half, in this process or under torchrun, and passes back how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from ckpt_tools.core import packages
from ckpt_tools.core.errors import UsageError
from tests.cli.conftest import Run


@dataclass(frozen=True)
class Report:
    steps: int


class Training(ModuleType):
    """Stands in for `automodel.training`, which needs torch."""

    def __init__(self, output_dir: Path) -> None:
        super().__init__("automodel.training")
        self.output_dir = output_dir
        self.calls: list[tuple[str, list[str]]] = []
        self.error: Exception | None = None
        self.at_sigterm: object = None

    def run(self, config: str, overrides: list[str]) -> Report:
        self.calls.append((config, overrides))
        self.at_sigterm = signal.getsignal(signal.SIGTERM)
        sys.stdout.write("a library prints\n")
        if self.error is not None:
            raise self.error
        return Report(20)

    def load_config(self, path: Path, overrides: list[str]) -> Training:
        assert path.exists()
        assert overrides == ["steps=20"]
        return self


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text("steps: 1\n")
    return path


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Training:
    module = Training(tmp_path)
    monkeypatch.setitem(sys.modules, "automodel.training", module)
    monkeypatch.setattr(packages, "is_found", bool)
    return module


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, training: Training) -> Path:
    """Replaces python by a script that writes its arguments down and ends as `ending` says; returns its folder."""
    del training
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\necho a rank prints\n. {tmp_path}/ending\n'
    )
    script.chmod(0o755)
    (tmp_path / "ending").write_text("exit 0")
    monkeypatch.setattr(sys, "executable", str(script))
    return tmp_path


def test_the_config_and_its_overrides_reach_training(ckpt: Run, config: Path, training: Training) -> None:
    ran = ckpt("train", config, "--set", "steps=20", "--set", "optimizer.lr=1e-4")
    assert (ran.code, ran.stdout) == (0, "")
    assert training.calls == [(str(config), ["steps=20", "optimizer.lr=1e-4"])]


def test_with_json_stdout_has_the_report_alone(ckpt: Run, config: Path, training: Training) -> None:
    ran = ckpt("train", config, "--json")
    assert training.calls
    assert (ran.code, ran.json) == (0, {"steps": 20})
    assert "a library prints" in ran.stderr


def test_an_error_of_training_is_said_like_any_other(ckpt: Run, config: Path, training: Training) -> None:
    training.error = UsageError("the config has no key stebs", hint="did you mean steps?")
    ran = ckpt("train", config)
    assert ran.code == 2
    assert ran.stderr.endswith("error: the config has no key stebs\nhint: did you mean steps?\n")


def test_several_processes_are_started_by_torchrun(
    ckpt: Run, config: Path, torchrun: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (torchrun / "report.json").write_text(json.dumps({"steps": 20}))
    ran = ckpt("train", config, "--nproc-per-node", 2, "--set", "steps=20", "--json", "-q")
    assert (ran.code, ran.json) == (0, {"steps": 20})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    rank = ["-m", "ckpt_tools", "train", str(config), "--set", "steps=20", "--quiet"]
    assert capfd.readouterr() == ("", "a rank prints\n")
    assert (torchrun / "arguments").read_text().split() == [*launcher, *rank]


@pytest.mark.parametrize(("ending", "code"), [("exit 3", 3), ("kill -TERM $$", 128 + signal.SIGTERM)])
def test_the_exit_code_of_torchrun_is_passed_on(
    ckpt: Run, config: Path, torchrun: Path, ending: str, code: int
) -> None:
    (torchrun / "ending").write_text(ending)
    ran = ckpt("train", config, "--nproc-per-node", 2)
    assert ran.code == code
    assert f"error: training ended with exit code {code}\n" in ran.stderr


def test_training_in_this_process_finds_sigterm_as_it_is(ckpt: Run, config: Path, training: Training) -> None:
    ckpt("train", config)
    assert training.at_sigterm is signal.SIG_DFL


TERMINATED = """
import sys
from ckpt_tools.cli import main, train
train.find_spec = lambda name: name
sys.executable, config = sys.argv[1:]
sys.argv = ["ckpt", "train", config, "--nproc-per-node", "2"]
main()
"""


SLOWLY_STARTED = """
import subprocess, time
start = subprocess.Popen.__init__
def slowly(*arguments, **options):
    start(*arguments, **options)
    time.sleep(0.5)
subprocess.Popen.__init__ = slowly
"""


@pytest.mark.parametrize("before", ["", SLOWLY_STARTED], ids=["as it runs", "as it starts"])
def test_sigterm_is_passed_on_to_torchrun_whose_processes_save_first(config: Path, torchrun: Path, before: str) -> None:
    ending = f"trap 'sleep 0.2; echo saved > {torchrun}/saved; exit 1' TERM\nkill -TERM $PPID\nsleep 20 & wait"
    (torchrun / "ending").write_text(ending)
    python, script = os.path.realpath(f"/proc/{os.getpid()}/exe"), str(torchrun / "python")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [python, "-c", before + TERMINATED, script, str(config)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (torchrun / "saved").read_text() == "saved\n"
    assert ran.returncode == 128 + signal.SIGTERM
    assert ran.stderr.endswith("error: ended by SIGTERM\nhint: the same command again resumes at the last save\n")


def test_missing_packages_are_named_with_the_command_that_installs_them(
    ckpt: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "is_found", lambda name: name != "transformers")
    ran = ckpt("train", config)
    assert ran.code == 1
    assert "training needs transformers, which this Python does not have" in ran.stderr
    assert f"hint: {sys.executable} -m pip install 'nemo-automodel-ckpt[train]'" in ran.stderr


@pytest.mark.usefixtures("training")
def test_what_is_wrong_is_refused_before_a_process_is_started(ckpt: Run, config: Path) -> None:
    absent = ckpt("train", config.with_name("absent.yaml"), "--nproc-per-node", 2)
    assert (absent.code, "there is no config" in absent.stderr) == (11, True)
    unset = ckpt("train", config, "--set", "steps", "--nproc-per-node", 2)
    assert (unset.code, "'steps' is not KEY=VALUE" in unset.stderr) == (2, True)
    assert os.listdir(config.parent) == ["train.yaml"]
