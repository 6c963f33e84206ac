"""`ckpt roundtrip`: convert, consolidate, compare. The check for continuous integration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_tools.cli import options
from ckpt_tools.cli.output import Output
from ckpt_tools.cli.text import aligned, counted, duration
from ckpt_tools.core.sizes import format_size

if TYPE_CHECKING:
    from ckpt_tools.api import RoundtripReport

EXAMPLES = (
    "ckpt roundtrip ./Qwen3-30B-A3B",
    "ckpt roundtrip ./Qwen3-30B-A3B --mesh dp_shard=3,ep=8 --work /scratch",
)


def roundtrip(
    source: options.Source,
    work: Annotated[
        str | None,
        typer.Option(
            "--work",
            help="Directory for the two copies, which are removed afterwards. Default: the system's temporary "
            "directory. Example: --work /scratch",
        ),
    ] = None,
    mesh: options.Mesh = None,
    family: options.Family = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert, consolidate, and compare with the source bit for bit.

    The check for continuous integration. It needs room for two copies, which are removed afterwards.
    """
    from ckpt_tools import api

    out = Output(json, quiet)
    with out.progress() as progress:
        report = api.roundtrip(source, work=work, mesh=mesh, family=family, threads=threads, progress=progress)
    out.done(report, _lines(report))


def _lines(report: RoundtripReport) -> list[str]:
    equal = f"{counted(report.tensors, 'tensor')}, {format_size(report.nbytes)}"
    return [
        *aligned(
            (
                ("converted", duration(report.convert_seconds)),
                ("consolidated", duration(report.consolidate_seconds)),
                ("compared", duration(report.verify_seconds)),
            )
        ),
        f"{report.source} ({report.family}) came back equal bit for bit: {equal}",
    ]
