"""Writing: behind where the system has it, plainly where it lacks it, the same bytes either way."""

from __future__ import annotations

import errno
import os
import random
from itertools import pairwise
from pathlib import Path

import pytest

from ckpt_tools.core.errors import StorageError
from ckpt_tools.engine import files
from ckpt_tools.engine.files import BEHIND, PAGE, FileWriter

SIZE = 3 * BEHIND + 5
CUTS = (0, 7, PAGE, BEHIND + PAGE + 1, SIZE)

behind = pytest.mark.skipif(not files.WRITE_BEHIND, reason="only Linux writes behind")


def write(root: Path) -> bool:
    """Writes random bytes in ranges of odd and even places and sizes; whether the file then holds them."""
    content = random.Random(1).randbytes(SIZE)
    with FileWriter(root) as writer:
        writer.create("f", SIZE)
        for low, high in pairwise(CUTS):
            writer.write("f", low, memoryview(content)[low:high])
        writer.sync()
    return (root / "f").read_bytes() == content


@pytest.mark.parametrize("switch", [True, False])
def test_ranges_of_any_place_and_size_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: bool
) -> None:
    if not switch:
        monkeypatch.setattr(files, "WRITE_BEHIND", False)
        monkeypatch.setattr(os, "pwritev", lambda *_: pytest.fail("wrote behind"), raising=False)
    assert write(tmp_path)


@behind
@pytest.mark.parametrize(
    "lack", [OSError(errno.EOPNOTSUPP, ""), OSError(errno.ENOSYS, ""), OSError(errno.EINVAL, ""), NotImplementedError()]
)
def test_a_system_that_cannot_write_behind_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: Exception
) -> None:
    asked = []

    def refuse(*call: object) -> int:
        asked.append(call)
        raise lack

    monkeypatch.setattr(os, "pwritev", refuse)
    assert write(tmp_path)
    assert len(asked) == 1


@behind
def test_a_full_disk_is_not_taken_for_a_system_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(StorageError, match="No space left"):
        write(tmp_path)
