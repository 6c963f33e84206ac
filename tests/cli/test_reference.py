"""The documentation page of the command line is the command line's own words, and its examples are real commands."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tools.cli.reference import Verb, verbs

ROOT = Path(__file__).parents[2]
VERBS = verbs()


def test_the_page_is_up_to_date() -> None:
    command = [sys.executable, "scripts/cli_docs.py", "--check"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PYTHONPATH": "."})
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_example_uses_options_that_exist(verb: Verb) -> None:
    options = {name for parameter in verb.parameters for name in parameter.names if parameter.kind == "option"}
    assert verb.examples
    for example in verb.examples:
        words = shlex.split(example)
        assert verb.name in words
        assert {word for word in words[words.index(verb.name) :] if word.startswith("-")} <= options


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_parameter_says_what_it_is_and_gives_its_default_and_an_example(verb: Verb) -> None:
    for parameter in verb.parameters:
        assert parameter.help, parameter.names
        assert parameter.help.rpartition("Example: ")[0] or parameter.help.endswith("."), parameter.names
        if parameter.kind == "option" and parameter.values in ("text", "integer"):
            assert "Example: --" in parameter.help, parameter.names
            assert parameter.default or "Default: " in parameter.help, parameter.names


def test_every_verb_takes_json_and_quiet() -> None:
    for verb in VERBS:
        names = {name for parameter in verb.parameters for name in parameter.names}
        assert {"--json", "--quiet", "-q"} <= names, verb.name
