"""Every reader loads what `ckpt consolidate` writes and computes what the source computed.

Deselected unless `--readers` names readers: `make readers` runs the whole matrix, continuous integration a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.readers import matrix
from tests.readers.cases import CASES
from tests.readers.matrix import Cell, Workshop

pytestmark = [pytest.mark.readers, pytest.mark.timeout(900)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = matrix.cells(_readers(metafunc.config), _cases(metafunc.config))
    metafunc.parametrize("cell", chosen, ids=lambda cell: f"{cell.reader}-from_{cell.writer}-{cell.case}")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("readers"), _cases(pytestconfig))


@pytest.fixture(scope="session")
def findings(pytestconfig: pytest.Config) -> Iterator[list[matrix.Finding]]:
    rows: list[matrix.Finding] = []
    yield rows
    if path := pytestconfig.getoption("--readers-json"):
        matrix.save(path, rows)


def test_the_reader_agrees_with_the_source(cell: Cell, workshop: Workshop, findings: list[matrix.Finding]) -> None:
    report = workshop.report(cell)
    findings.append(matrix.finding(cell, report))
    if cell.limit is None:
        assert matrix.faults(report) == []
    else:
        (stock,) = workshop.ask([cell], [workshop.source(cell)])
        assert not matrix.agrees(stock), f"{cell.reader} reads the stock {cell.case}: its entry in LIMITS is wrong"
        assert not matrix.agrees(report), f"{cell.reader} now reads {cell.case}: remove its entry from LIMITS"


def _readers(config: pytest.Config) -> tuple[str, ...]:
    return _known(config.getoption("--readers"), matrix.READERS, "reader")


def _cases(config: pytest.Config) -> tuple[str, ...]:
    return _known(config.getoption("--reader-cases"), tuple(CASES), "case")


def _known(names: tuple[str, ...] | None, known: tuple[str, ...], kind: str) -> tuple[str, ...]:
    """The names asked for; all that are known when none is named, or `all`."""
    if not names or names == ("all",):
        return known
    if unknown := set(names) - set(known):
        raise pytest.UsageError(f"no such {kind}: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names
