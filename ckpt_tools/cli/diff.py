"""`ckpt diff`: names, shapes and dtypes that two checkpoints do not have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_tools.cli import options
from ckpt_tools.cli.output import Output
from ckpt_tools.cli.text import aligned, counted
from ckpt_tools.core.errors import MismatchError

if TYPE_CHECKING:
    from ckpt_tools.engine.describe import Difference

EXAMPLES = ("ckpt diff ./Qwen3-30B-A3B ./published", "ckpt diff ./native ./published --json")


def diff(
    left: Annotated[str, typer.Argument(metavar="LEFT", help="A checkpoint.")],
    right: Annotated[str, typer.Argument(metavar="RIGHT", help="Another one, on either side of the layout.")],
    family: options.Family = None,
    like: options.Like = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List the tensors that two checkpoints do not have alike.

    Compares names, shapes and dtypes through the layout, from headers only; `ckpt verify --against` compares values.
    Exits with 5 when there is a difference.
    """
    from ckpt_tools import api

    out = Output(json, quiet)
    differences = api.diff(left, right, family=family, like=like)
    out.show({"left": left, "right": right, "differences": differences}, _lines(left, right, differences))
    if differences:
        raise typer.Exit(MismatchError.exit_code)
    given = f" --like {quote(like)}" if like else ""
    out.hint(f"values were not read; this compares them: ckpt verify {quote(left)} --against {quote(right)}{given}")


def _lines(left: str, right: str, differences: Sequence[Difference]) -> Iterator[str]:
    if not differences:
        yield "the same names, shapes and dtypes"
        return
    rows = [("tensor", left, right)]
    rows += [(d.name, d.left or "absent", d.right or "absent") for d in differences]
    yield from aligned(rows)
    yield counted(len(differences), "difference")
