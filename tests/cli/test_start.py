"""The command starts fast: what it imports is asserted, because times depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tools import __version__
from tests.cli.conftest import Run

HEAVY = ("torch", "transformers", "safetensors", "numpy", "ml_dtypes", "huggingface_hub", "yaml", "rich", "automodel")
PROGRAM = """
import json, sys
sys.argv = ["ckpt", *sys.argv[1:]]
from ckpt_tools.cli import main
try:
    main()
except SystemExit as ended:
    print(json.dumps([name for name in {heavy} if name in sys.modules]), file=sys.stderr)
    raise
"""


def imported(*arguments: str) -> list[str]:
    """The heavy packages that a run of the command has imported at its end."""
    command = [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), *arguments]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: list[str] = json.loads(ran.stderr.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["convert", "--help"],
        ["train", "--help"],
        ["doctor", "--help"],
        ["families"],
        ["inspect", "{repository}"],
        ["inspect", "{native}"],
        ["plan", "{repository}"],
        ["plan", "{native}", "--json"],
        ["diff", "{repository}", "{native}"],
        ["explain", "{repository}", "lm_head.weight"],
    ],
    ids=" ".join,
)
def test_looking_imports_nothing_heavy(arguments: list[str], repository: Path, native: Path) -> None:
    assert imported(*(argument.format(repository=repository, native=native) for argument in arguments)) == []


def test_moving_and_comparing_bytes_needs_neither_a_framework_nor_rich(
    repository: Path, native: Path, tmp_path: Path
) -> None:
    for arguments in (("verify", native, "--against", repository), ("convert", repository, tmp_path / "out")):
        assert set(imported(*map(str, arguments))) <= {"numpy"}


def test_help_is_plain_text_and_lists_every_verb_in_whole_sentences(ckpt: Run) -> None:
    ran = ckpt("--help")
    assert ran.code == 0
    assert "  convert      Make a native checkpoint out of a Hugging Face repository.\n" in ran.stdout
    assert "..." not in ran.stdout.partition("Commands:")[2]
    assert ckpt("-h").stdout == ran.stdout
    assert ckpt().stdout == ran.stdout


def test_help_of_a_verb_keeps_its_examples_on_their_lines(ckpt: Run) -> None:
    assert "  ckpt convert ./native ./native-ep8 --mesh ep=8\n" in ckpt("convert", "--help").stdout


def test_the_module_is_the_command(shell: Run, ckpt: Run) -> None:
    assert shell("--version").stdout == ckpt("--version").stdout == f"ckpt {__version__}\n"
    assert shell("families").stdout == ckpt("families").stdout


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("ckpt con", {"convert", "consolidate"}),
        ("ckpt convert --family qwen3_m", {"qwen3_moe"}),
        ("ckpt families qwen3", {"qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next"}),
        ("ckpt convert --dtype b", {"bfloat16"}),
        ("ckpt convert --format s", {"safetensors"}),
        ("ckpt convert --mesh dp_shard=2,", {"dp_shard=2,ep="}),
        ("ckpt families mix", {"mixtral"}),
        ("ckpt verify --ag", {"--against"}),
    ],
)
def test_the_shell_completes(shell: Run, words: str, completions: set[str]) -> None:
    count = str(len(words.split()) - 1)
    environment = {"_CKPT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
    assert set(shell(env=environment).stdout.split()) == completions


def test_a_log_of_another_encoding_gets_escapes_in_place_of_a_crash(shell: Run) -> None:
    ran = shell("inspect", "für", env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert ran.code == 11
    assert "f\\xfcr" in ran.stderr
