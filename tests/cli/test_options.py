"""Every option of every verb reaches the parameter of its name in the function behind the verb."""

from __future__ import annotations

import pytest

import ckpt_tools.api
from ckpt_tools.cli.reference import Parameter, Verb, verbs
from tests.cli.conftest import Run

SPELLED_OTHERWISE = {"for": "readers", "format": "file_format"}
NOT_ONE_FUNCTION = ("train", "families", "doctor", "estimate")
ABOUT_OUTPUT = {"--json", "--quiet"}


class Called(Exception):
    """Raised in place of the work."""


def value_of(parameter: Parameter) -> str:
    """A value that is not the default."""
    if parameter.values == "integer":
        return "3"
    return next(value for value in (*parameter.values.split("|"), "other") if value != parameter.default)


@pytest.mark.parametrize("verb", [v for v in verbs() if v.name not in NOT_ONE_FUNCTION], ids=lambda v: v.name)
def test_every_option_reaches_the_function(ckpt: Run, monkeypatch: pytest.MonkeyPatch, verb: Verb) -> None:
    seen: dict[str, object] = {}

    def record(*arguments: object, **keywords: object) -> None:
        seen.update(keywords, arguments=list(arguments))
        raise Called

    monkeypatch.setattr(ckpt_tools.api, verb.name, record)
    typed: list[str] = []
    wanted: dict[str, object] = {"arguments": []}
    for parameter in verb.parameters:
        name = parameter.names[-1]
        if parameter.kind == "argument":
            typed.append(name)
            wanted["arguments"] = [*typed]
        elif not ABOUT_OUTPUT & set(parameter.names):
            key = name.removeprefix("--").removeprefix("no-").replace("-", "_")
            flag = parameter.values == "flag"
            value = value_of(parameter)
            typed += [name] if flag else [name, value]
            wanted[SPELLED_OTHERWISE.get(key, key)] = (
                parameter.default is None if flag else 3 if parameter.values == "integer" else value
            )
    ckpt(verb.name, *typed)
    for given in ("progress", "ranks"):
        seen.pop(given, None)
    assert seen == wanted
