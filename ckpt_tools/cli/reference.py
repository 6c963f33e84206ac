"""The command line described as data: for its documentation page, and for the test that freezes it."""

from __future__ import annotations

import inspect
import types
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import typer.main

from ckpt_tools.cli.app import VERBS, app


@dataclass(frozen=True)
class Parameter:
    """One argument or option of a verb.

    Attributes:
        kind: `argument` or `option`.
        names: the metavar of an argument, or every spelling of an option.
        values: `text`, `integer`, `flag`, or the choices joined by `|`; `, repeatable` when it may be given often.
        default: as it is typed; None when there is none.
        required: it has to be given.
        help: its text.
    """

    kind: Literal["argument", "option"]
    names: tuple[str, ...]
    values: str
    default: str | None
    required: bool
    help: str


@dataclass(frozen=True)
class Verb:
    """One verb; `help` is its docstring without indentation."""

    name: str
    help: str
    examples: tuple[str, ...]
    parameters: tuple[Parameter, ...]


def verbs() -> list[Verb]:
    """Every verb of the application, in the order of its help."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = []
    for name, (function, examples) in VERBS.items():
        kinds, defaults = typing.get_type_hints(function), inspect.signature(function).parameters
        parameters = tuple(
            Parameter(
                parameter.param_type_name,
                _names(parameter),
                _values(kinds[parameter.name]),
                _default(defaults[parameter.name].default),
                parameter.required,
                parameter.help,
            )
            for parameter in commands[name].params
            if parameter.name in kinds
        )
        found.append(Verb(name, inspect.getdoc(function) or "", examples, parameters))
    return found


def _names(parameter: typing.Any) -> tuple[str, ...]:
    if parameter.param_type_name == "argument":
        return (parameter.metavar.strip("[]"),)
    return (*parameter.opts, *parameter.secondary_opts)


def _values(kind: object) -> str:
    options = [choice for choice in typing.get_args(kind) if choice is not types.NoneType]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return _values(options[0])
    if typing.get_origin(kind) is list:
        return f"{_values(options[0])}, repeatable"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    return {bool: "flag", int: "integer", str: "text"}[typing.cast(type, kind)]


def _default(value: object) -> str | None:
    if value is None or value is inspect.Parameter.empty or value is False:
        return None
    if isinstance(value, Enum):
        return str(value.value)
    return "on" if value is True else str(value)
