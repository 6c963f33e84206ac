"""Columns, counts, durations, and text that is safe to show."""

from __future__ import annotations

import pytest

from ckpt_tools.cli.text import aligned, counted, duration, printable


def test_columns_are_as_wide_as_their_widest_cell_and_lines_have_no_blanks_at_the_end() -> None:
    rows = [("name", "count", ""), ("a", "1", "x"), ("longer name", "1,000", "")]
    assert aligned(rows, right={1}) == ["name         count", "a                1  x", "longer name  1,000"]
    assert aligned([]) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.01 s"),
        (0.424, "0.42 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (4320, "1 h 12 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_one_is_singular() -> None:
    assert [counted(n, "entry", "entries") for n in (0, 1, 18_867)] == ["0 entries", "1 entry", "18,867 entries"]
    assert counted(2, "file") == "2 files"


@pytest.mark.parametrize("hostile", ["\033[2J", "\r", "\x00", "\u202e", "\x9b"])
def test_characters_that_steer_a_terminal_are_escaped(hostile: str) -> None:
    assert printable(f"a{hostile}b").isprintable()
    assert printable("Ünïcode\tis\nkept") == "Ünïcode\tis\nkept"
