"""What a conversion, a consolidation or their plan looks like to people; three verbs share it."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote
from typing import TYPE_CHECKING

from ckpt_tools.cli.text import aligned, counted, duration, names_of
from ckpt_tools.core.sizes import format_size

if TYPE_CHECKING:
    from ckpt_tools.api import CopyReport

_LISTED = 5
"""Names left out for one reason that are shown one by one."""


def copy_lines(report: CopyReport) -> list[str]:
    """The report as aligned lines."""
    return aligned(_rows(report))


def _rows(report: CopyReport) -> Iterator[tuple[str, str]]:
    planned = report.destination is None
    yield "plan" if planned else "made", report.destination or "nothing was written"
    yield "from", f"{report.source} ({report.family}, {names_of(report.dialect, report.prefix)})"
    yield "to", f"{names_of(report.target_side)}, {counted(report.files, 'file')}, {format_size(report.nbytes)}"
    yield "tensors", f"{report.tensors:,}" + (f", {report.casts:,} of them cast" if report.casts else "")
    if report.dequantized:
        yield "dequantised", counted(report.dequantized, "tensor")
    if report.quantized:
        yield "quantised", counted(report.quantized, "tensor") + ("" if planned else f"; {_rounded(report)}")
    if report.shared:
        share = 100 * report.shared / report.nbytes
        yield "shared", f"{format_size(report.shared)}, {share:.1f} %, without a copy on the disk"
    if report.undigested:
        yield "digests", f"none for {counted(report.undigested, 'tensor')} that are shared unread; --digests makes them"
    for reason in dict.fromkeys(report.dropped.values()):
        names = [name for name, why in report.dropped.items() if why == reason]
        for name in names if len(names) <= _LISTED else names[:1]:
            yield "left out", f"{name}: {reason}"
        if len(names) > _LISTED:
            yield "left out", f"{len(names) - 1:,} more of the kind"
    if report.skipped:
        yield "skipped", f"{counted(report.skipped, 'entry', 'entries')} that are not weights of the model"
    if report.unchecked:
        yield "unchecked", f"the values that are read: {report.unchecked}"
    if planned:
        yield "memory", f"at most {format_size(report.memory)} in {counted(report.threads, 'thread')}"
    else:
        rate = f" ({format_size(report.nbytes / report.seconds)}/s)" if report.seconds else ""
        ranks = f" in {counted(report.ranks, 'process', 'processes')}" if report.ranks > 1 else ""
        yield "time", f"{duration(report.seconds)}{ranks}{rate}"


def _rounded(report: CopyReport) -> str:
    if not report.rounded:
        return "every value reads back bit for bit"
    return f"{report.rounded:,} of them hold values that do not read back bit for bit"


def next_step(report: CopyReport, source: str, like: str | None = None) -> str:
    """The command that checks what was made, or that makes what was planned."""
    if report.destination is not None:
        given = f" --like {quote(like)}" if like else ""
        return f"compare every value: ckpt verify {quote(report.destination)} --against {quote(source)}{given}"
    verb = "convert" if report.target_side == "native" else "consolidate"
    return f"the same options make it: ckpt {verb} {quote(source)} DST"
