"""What these tests share: the full size on request, and segments small enough to have many."""

from __future__ import annotations

import os
import sys

import pytest

from ckpt_tools.engine import sharing
from tests.engine.file_systems import BLOCK, stand_in
from tests.robustness import scenarios

# The shim asks /proc where a descriptor leads, and children are waited for through theirs.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether `--full` asks for every kill point and fault instead of a part of them."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_tools.engine.plan.SEGMENT", scenarios.SEGMENT)


@pytest.fixture
def sharing_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that shares blocks, and runs of one block worth sharing."""
    stand_in(monkeypatch)
    monkeypatch.setattr(sharing, "WORTH", BLOCK)


@pytest.fixture
def fast_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs do nothing: what a killed process has written is with the kernel, synced or not."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
