"""Options of the test suite: which outside readers take part, and the hypothesis profile of continuous integration."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("readers", "outside readers of consolidated checkpoints")
    group.addoption("--readers", type=_names, metavar="NAMES", help="readers to ask, comma-separated; or: all")
    group.addoption("--reader-cases", type=_names, metavar="NAMES", help="checkpoints to show them (default: all)")
    group.addoption("--readers-json", type=Path, metavar="PATH", help="write the matrix there")
    group = parser.getgroup("robustness", "kills, faults and races")
    group.addoption("--full", action="store_true", help="every kill point and fault, not a part of them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--readers"):
        return
    skipped = [item for item in items if item.get_closest_marker("readers")]
    if skipped:
        config.hook.pytest_deselected(items=skipped)
        items[:] = [item for item in items if item not in skipped]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
