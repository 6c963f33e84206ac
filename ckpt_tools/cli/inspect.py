"""`ckpt inspect`: what a checkpoint holds, from its headers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ckpt_tools.cli import options
from ckpt_tools.cli.output import Output
from ckpt_tools.cli.text import aligned, counted, names_of
from ckpt_tools.core.sizes import format_size

if TYPE_CHECKING:
    from ckpt_tools.api import InspectReport

EXAMPLES = ("ckpt inspect ./Qwen3-30B-A3B", "ckpt inspect ./runs/tuned/step-1000 --json")


def inspect(
    path: options.AnyCheckpoint,
    family: options.Family = None,
    dialect: options.Dialect = None,
    like: options.Like = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a checkpoint holds: format, family, files, tensors.

    Reads headers only. Tensors are grouped by name, with indices as *.
    """
    from ckpt_tools import api

    report = api.inspect(path, family=family, dialect=dialect, like=like)
    Output(json, quiet).show(report, _lines(report))


def _lines(report: InspectReport) -> Iterator[str]:
    yield from aligned(_facts(report))
    yield ""
    rows = [("tensors", "count", "dtype", "shape", "size")]
    rows += [(g.pattern, f"{g.count:,}", g.dtypes, g.shape, format_size(g.nbytes)) for g in report.groups]
    yield from aligned(rows, right={1, 4})


def _facts(report: InspectReport) -> Iterator[tuple[str, str]]:
    yield "path", report.path
    yield "format", f"{report.format} ({names_of(report.dialect, report.prefix)})"
    yield "family", report.family
    yield "tensors", f"{report.tensors:,} with {counted(report.parameters, 'element')}, {format_size(report.nbytes)}"
    yield "files", f"{len(report.files):,}"
    for name in report.dropped:
        yield "not used", name
    if report.skipped:
        yield "skipped", f"{counted(len(report.skipped), 'entry', 'entries')} that are not weights of the model"
    if report.side_files:
        yield "beside", ", ".join(report.side_files)
    if report.manifest:
        made = dict(report.manifest)
        yield "made by", made.pop("tool")
        yield "out of", "@".join(filter(None, made.values()))
