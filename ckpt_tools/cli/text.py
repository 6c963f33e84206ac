"""Plain text for people: aligned columns, counts and durations. No colour and no drawing characters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Rows of cells as lines of equal columns, two spaces apart; columns in `right` are aligned to the right."""
    table = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """`1 file`, `18,867 tensors`, `2 entries`."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def duration(seconds: float) -> str:
    """`0.42 s`, `35 s`, `2 min 05 s`, `1 h 12 min`."""
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds >= 0.0095 else "0.01 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02d} min"


def names_of(dialect: str, prefix: str = "") -> str:
    """`native`, `Hugging Face`, `torchtitan names`, `Hugging Face names after model.`."""
    known = {"hf": "Hugging Face", "native": "native"}
    if prefix:
        return f"{known.get(dialect, dialect)} names after {prefix}"
    return known.get(dialect) or f"{dialect} names"


def printable(text: str) -> str:
    """The text with control and formatting characters escaped: names come from files, and terminals obey such bytes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
