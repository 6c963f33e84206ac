"""`ckpt verify`: structure, digests, and values against another checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_tools.cli import options
from ckpt_tools.cli.output import Output
from ckpt_tools.cli.text import aligned, counted, duration, names_of
from ckpt_tools.core.sizes import format_size

if TYPE_CHECKING:
    from ckpt_tools.api import VerifyReport

EXAMPLES = (
    "ckpt verify ./native",
    "ckpt verify ./native --against ./Qwen3-30B-A3B",
    "ckpt verify ./published --no-digests --json",
)


def verify(
    path: options.AnyCheckpoint,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Another checkpoint of the same model, on either side of the layout; every value is compared, bit for "
            "bit. Default: none. Example: --against ./Qwen3-30B-A3B",
        ),
    ] = None,
    family: options.Family = None,
    dialect: options.Dialect = None,
    like: options.Like = None,
    digests: Annotated[
        bool,
        typer.Option(
            "--digests/--no-digests",
            help="Compare values with the digests of the manifest or the checksums that torch saved, and files with "
            "SHA256SUMS.",
        ),
    ] = True,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Prove that a checkpoint is whole, and equal to another one.

    Checks names, shapes and completeness from headers, then values by the digests of its manifest, then, with
    --against, every value of another checkpoint of the model, whichever side of the layout that is on.
    """
    from ckpt_tools import api

    out = Output(json, quiet)
    with out.progress() as progress:
        report = api.verify(
            path,
            against=against,
            family=family,
            dialect=dialect,
            like=like,
            digests=digests,
            threads=threads,
            progress=progress,
        )
    out.done(report, _lines(report))


def _lines(report: VerifyReport) -> list[str]:
    checked = (
        f"{counted(report.tensors, 'tensor')}, {counted(report.elements, 'element')}, {format_size(report.nbytes)}"
    )
    return [
        *aligned(("ok", check) for check in report.checks),
        f"verified {report.path} ({report.family}, {names_of(report.dialect)}): {checked}, {duration(report.seconds)}",
    ]
