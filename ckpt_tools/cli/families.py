"""`ckpt families`: the model families that have a native layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_tools.cli import options
from ckpt_tools.cli.output import Output
from ckpt_tools.cli.text import aligned
from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.names import nearest

if TYPE_CHECKING:
    from ckpt_tools.api import FamilyReport

EXAMPLES = ("ckpt families", "ckpt families qwen3_moe")


def families(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Show the layout of this family. Default: list all of them.",
            autocompletion=options.complete_family,
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List the families that have a native layout, or show one.

    Every other architecture is identity: its tensors keep their names, and only files and shards change.
    """
    from ckpt_tools import api

    reports = api.list_families()
    if name is not None:
        reports = _only(name, reports)
    lines = _table(reports) if name is None else _layout(reports[0])
    Output(json, quiet).show({"families": reports}, lines)


def _only(name: str, reports: Sequence[FamilyReport]) -> list[FamilyReport]:
    found = [report for report in reports if report.name == name]
    if not found:
        names = [report.name for report in reports]
        near = nearest(name, names)
        raise UsageError(f"there is no family {name!r}", hint=f"did you mean {near or ' or '.join(names)}?")
    return found


def _table(reports: Sequence[FamilyReport]) -> Iterator[str]:
    rows = [("family", "model", "model_type", "architecture", "trains as")]
    rows += [
        (r.name, r.title, ", ".join(r.model_types), r.architecture, "transformers" if r.data_only else "native model")
        for r in reports
    ]
    yield from aligned(rows)
    yield "every other architecture keeps its names and files are resharded as they are (identity)"


def _layout(report: FamilyReport) -> Iterator[str]:
    yield f"{report.title} ({report.architecture})"
    if report.dialects:
        yield f"read under other names, too: {', '.join(report.dialects)}"
    for native, rule in report.rules:
        yield native
        yield f"    {rule}"
