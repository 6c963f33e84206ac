"""What a directory is good for is found by trying, and nothing is left in it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ckpt_tools.engine import cloning, files, place
from ckpt_tools.engine.place import examine_place


def test_a_directory_is_looked_at_and_left_as_it_was(tmp_path: Path) -> None:
    found = examine_place(tmp_path)
    assert (found.path, found.obstacle, os.listdir(tmp_path)) == (str(tmp_path), "", [])
    assert found.total == shutil.disk_usage(tmp_path).total
    assert 0 < found.free <= found.total
    assert isinstance(found.shares_blocks, bool)


def test_one_that_will_be_made_stands_for_the_nearest_above_it(tmp_path: Path) -> None:
    assert examine_place(tmp_path / "runs" / "new").path == str(tmp_path)


@pytest.mark.parametrize("works", [True, False])
def test_shortcuts_are_reported_as_they_turn_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    def write(_: int, buffers: list[memoryview], *__: object) -> int:
        if not works:
            raise OSError(errno.EOPNOTSUPP, "")
        return len(buffers[0])

    monkeypatch.setattr(cloning, "clone_range", lambda *_: works)
    monkeypatch.setattr(files, "WRITE_BEHIND", True)
    monkeypatch.setattr(os, "pwritev", write, raising=False)
    found = examine_place(tmp_path)
    assert (found.shares_blocks, found.writes_behind) == (works, works)


def test_a_system_that_does_not_write_behind_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WRITE_BEHIND", False)
    monkeypatch.setattr(os, "pwritev", lambda *_: pytest.fail("was asked"), raising=False)
    assert examine_place(tmp_path).writes_behind is False


def test_a_directory_that_cannot_be_written_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = examine_place(tmp_path)
    assert (found.shares_blocks, found.writes_behind) == (None, None)
    assert found.obstacle == "Read-only file system"


MOUNTS = r"""
22 1 0:21 / / rw,relatime shared:1 - ext4 /dev/root rw
23 22 0:22 / /data rw master:2 shared:3 - xfs /dev/sdb rw
24 22 0:23 / /with\040space rw - btrfs /dev/sdc rw
25 22 0:24 / /data rw - nfs4 server:/export rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"), [("/home/me", "ext4"), ("/data", "nfs4"), ("/with space/a", "btrfs"), ("/datas", "ext4")]
)
def test_the_file_system_is_that_mounted_last_and_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, kind: str
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.strip())
    monkeypatch.setattr(place, "_MOUNTS", mounts)
    assert place._file_system_of(Path(folder)) == kind
    mounts.unlink()
    assert place._file_system_of(Path(folder)) == ""
