"""How a run ends when something is wrong: the sentence, the next step, the stream and the exit code."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ckpt_tools.api
from ckpt_tools.cli import failures
from ckpt_tools.core import errors
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (["convrt"], 2, "there is no verb 'convrt'", "did you mean ckpt convert?"),
        (["frobnicate"], 2, "there is no verb 'frobnicate'", "ckpt --help lists the verbs"),
        (["convert", "--mehs", "x"], 2, "ckpt convert has no option --mehs", "did you mean --mesh?"),
        (["convert", "--zzz"], 2, "ckpt convert has no option --zzz", "ckpt convert --help lists the options"),
        (["--dtype", "convert"], 2, "ckpt has no option --dtype", "options come after the verb: ckpt VERB --dtype"),
        (["convert"], 2, "Missing argument 'SRC'", "ckpt convert --help shows what it takes"),
        (["inspect", "{absent}"], 11, "does not exist", "give a directory, or a Hub repository"),
        (["convert", "{repository}", "{out}", "--mesh", "epp=2"], 2, "there is no axis 'epp'", "did you mean ep?"),
        (["convert", "{repository}", "{out}", "--dtype", "bf61"], 2, "unknown dtype 'bf61'", "did you mean BF16?"),
        (["convert", "{repository}", "{out}", "--dtype", "int8"], 2, "only BF16, F16, F32 and F64", ""),
        (["convert", "{repository}", "{out}", "--format", "pickle"], 2, "'pickle' is not one of 'dcp'", "--help"),
        (["convert", "{repository}", "{out}", "--family", "llamma"], 2, "no family 'llamma'", "did you mean llama?"),
        (
            ["convert", "{repository}", "{out}", "--memory", "1MB"],
            6,
            "memory bound of 1,000,000 bytes",
            "--memory 4MiB",
        ),
        (["convert", "{repository}", "{out}", "--memory", "much"], 2, "'much' is not a size", "512MiB"),
        (["convert", "{repository}", "{out}", "--threads", "0"], 2, "--threads", "--help"),
        (["plan", "{repository}", "--family", "mixtral"], 4, "", ""),
        (["explain", "{repository}", "lm_heat.weight"], 4, "lm_heat.weight", "did you mean lm_head.weight?"),
        (["verify", "{garbage}"], 3, "", ""),
    ],
)
def test_an_error_is_a_sentence_with_the_next_step(
    ckpt: Run, repository: Path, tmp_path: Path, arguments: list[str], code: int, error: str, hint: str
) -> None:
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "model.safetensors").write_bytes(b"\xff" * 64)
    places = {"repository": repository, "absent": tmp_path / "absent", "garbage": garbage, "out": tmp_path / "out"}
    filled = [argument.format(**places) for argument in arguments]
    ran = ckpt(*filled)
    assert ran.code == code
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert "Traceback" not in ran.stderr
    said, _, advice = ran.stderr.partition("\nhint: ")
    assert error in said
    assert hint in advice
    as_json = ckpt(*filled, "--json")
    assert (as_json.code, as_json.stderr) == (code, "")
    assert as_json.json["exit_code"] == code
    assert error in as_json.json["error"]
    assert hint in (as_json.json["hint"] or "")


def _subclasses(kind: type[errors.CkptError]) -> list[type[errors.CkptError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _subclasses(child))]


@pytest.mark.parametrize("kind", [k for k in _subclasses(errors.CkptError) if k.__module__ == errors.__name__])
def test_every_error_class_ends_the_run_with_its_own_code(
    ckpt: Run, monkeypatch: pytest.MonkeyPatch, kind: type[errors.CkptError]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("what and where", hint="the next step")

    monkeypatch.setattr(ckpt_tools.api, "inspect", fail)
    ran = ckpt("inspect", "x")
    assert (ran.code, ran.stderr) == (kind.exit_code, "error: what and where\nhint: the next step\n")
    assert kind.exit_code in failures.EXIT_CODES


def test_a_failing_disk_is_a_storage_error_and_not_a_traceback(ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/model.safetensors")

    monkeypatch.setattr(ckpt_tools.api, "inspect", fail)
    ran = ckpt("inspect", "x")
    assert (ran.code, ran.stderr) == (7, "error: Input/output error: /data/model.safetensors\n")


def test_a_defect_shows_its_traceback_and_exits_with_70(ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(ckpt_tools.api, "inspect", fail)
    ran = ckpt("inspect", "x")
    assert ran.code == 70
    assert "Traceback (most recent call last)" in ran.stderr
    assert "error: ZeroDivisionError: by zero\nhint: this is a defect of ckpt" in ran.stderr
    as_json = ckpt("inspect", "x", "--json")
    assert as_json.json["exit_code"] == 70
    assert "Traceback" in as_json.stderr


@pytest.mark.parametrize(
    ("verb", "hint"), [("convert", "hint: the same command again goes on where this one stopped\n"), ("verify", "")]
)
def test_an_interrupted_run_says_whether_a_rerun_goes_on(
    ckpt: Run, monkeypatch: pytest.MonkeyPatch, verb: str, hint: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ckpt_tools.api, verb, interrupt)
    ran = ckpt(verb, "x", *(["y"] if verb == "convert" else []))
    assert (ran.code, ran.stderr) == (130, f"error: interrupted\n{hint}")


def test_ctrl_c_reaches_a_process(tmp_path: Path) -> None:
    program = """if True:
        import signal, sys, time
        import ckpt_tools.api
        # A test run in the background of a shell inherits that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from ckpt_tools.cli import main
        ckpt_tools.api.inspect = lambda *a, **k: (print(flush=True), time.sleep(60))
        sys.argv = ["ckpt", "inspect", "x"]
        main()
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=tmp_path, env=environment) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=30)
    assert (child.returncode, stderr) == (130, "error: interrupted\n")


def test_a_reader_that_goes_away_ends_the_run_quietly(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ckpt_tools", "families"]
    ran = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment, check=False
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_colour", "coloured"), [("", True), ("1", False)])
def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch, no_colour: str, coloured: bool) -> None:
    from ckpt_tools.cli.output import Output

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setenv("TERM", "xterm")
    Output().fail("broken", "repair it", 1)
    assert ("\033[1;31merror: \033[0mbroken" in terminal.getvalue()) is coloured
    assert (terminal.getvalue() == "error: broken\nhint: repair it\n") is not coloured


def test_the_page_of_errors_lists_every_exit_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ") and line[2].isdigit()]
    documented = {int(code): name.strip(" `") for code, name in rows}
    assert set(documented) == set(failures.EXIT_CODES)
    for code, name in documented.items():
        if name:
            assert getattr(errors, name).exit_code == code
