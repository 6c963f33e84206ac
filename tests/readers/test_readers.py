"""Every reader loads what `ckpt consolidate` writes and computes what the source computed.

Deselected unless `--readers` names readers: `make readers` runs the whole matrix, continuous integration a part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.readers import matrix
from tests.readers.matrix import Cell, Workshop

pytestmark = [pytest.mark.readers, pytest.mark.timeout(900)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = matrix.cells(_readers(metafunc.config), _cases(metafunc.config))
    metafunc.parametrize("cell", chosen, ids=lambda cell: f"{cell.reader}-from_{cell.writer}-{cell.case}")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("readers"), _cases(pytestconfig))


@pytest.fixture(scope="session")
def record(pytestconfig: pytest.Config) -> Callable[[matrix.Finding], None]:
    """Keeps a finding in the file that `--readers-json` names, at once: an interrupted run leaves what it had."""
    rows: list[matrix.Finding] = []

    def keep(found: matrix.Finding) -> None:
        rows.append(found)
        if path := pytestconfig.getoption("--readers-json"):
            matrix.save(path, rows)

    return keep


def test_the_reader_agrees_with_the_source(
    cell: Cell, workshop: Workshop, record: Callable[[matrix.Finding], None]
) -> None:
    if cell.form:
        differences = workshop.differences(cell)
        if cell.stands_in:
            record(matrix.finding_of_values(cell, differences))
        assert differences == [], "what --quantize writes is not what was published"
    if cell.stands_in:
        return
    report = workshop.report(cell)
    record(matrix.finding(cell, report))
    if cell.limit is None:
        assert matrix.faults(report) == []
        return
    (stock,) = workshop.ask([cell], [workshop.source(cell)])
    assert not matrix.agrees(stock), f"{cell.reader} reads the stock {cell.case}: its limit is wrong"
    assert not matrix.agrees(report), f"{cell.reader} now reads {cell.case}: remove its limit"
    if cell.refusal:
        assert cell.refusal.error in (report["error"] or ""), "it fails for another reason than its limit says"
        if cell.refusal.instead:
            (accepted,) = workshop.ask([cell], [workshop.consolidated_for_its_reader(cell)])
            assert matrix.faults(accepted) == []


def test_the_reader_needs_the_options_that_it_is_given(cell: Cell, workshop: Workshop) -> None:
    if cell.options:
        (without,) = workshop.ask([cell], [workshop.consolidated(cell)], with_options=False)
        assert not matrix.agrees(without), f"{cell.reader} reads {cell.case} without options: remove them"


def _readers(config: pytest.Config) -> tuple[str, ...]:
    return _known(config.getoption("--readers"), matrix.READERS, "reader")


def _cases(config: pytest.Config) -> tuple[str, ...]:
    return _known(config.getoption("--reader-cases"), matrix.ALL_CASES, "case")


def _known(names: tuple[str, ...] | None, known: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """The names asked for; all that are known when none is named, or `all`."""
    if not names or names == ("all",):
        return known
    if unknown := set(names) - set(known):
        raise pytest.UsageError(f"no such {kind}: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names
