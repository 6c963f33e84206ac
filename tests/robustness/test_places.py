"""Outputs and inputs in awkward places: read-only, forbidden, full, a mount point, the root."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tools import convert
from ckpt_tools.core.errors import (
    ResourceError,
    StorageError,
    UsageError,
)
from ckpt_tools.engine import bounds
from tests.checkpoints import make_repository
from tests.robustness.scenarios import (
    SCENARIOS,
    Scenario,
    Stage,
    counted_tasks,
    in_child,
)
from tests.robustness.shim import Recorder

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


@pytest.mark.parametrize("output", ["/", "/proc"])
def test_an_output_that_cannot_be_exchanged_is_refused_at_once(tmp_path: Path, output: str) -> None:
    source = make_repository(tmp_path / "source")
    with pytest.raises(UsageError, match=r"the root of the file system|mount point"):
        convert(source, output, overwrite=True)


def test_an_older_output_that_was_moved_aside_by_hand_is_not_lost(tmp_path: Path) -> None:
    """On file systems that cannot exchange; a directory of that name that no killed run explains is left alone."""
    stage = Stage(tmp_path, SCENARIOS[5])
    stage.reset()
    aside = stage.out.with_name(".out.ckpt-old")
    aside.mkdir()
    with stage.shim(Recorder()), pytest.raises(StorageError, match="in the way"):
        stage.run()
    assert stage.state() == "old"
    assert aside.exists()


def _libc_mount(source: str | None, target: Path, kind: str | None, flags: int, data: str | None = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    if libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()):
        raise OSError(ctypes.get_errno(), "mount")


READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE, NEW_MOUNTS = 1, 32, 4096, 16384, 1 << 18, 0x20000


def _with_own_mounts(act: Callable[[], object]) -> int:
    """Exit code of `act` in a process whose mounts nobody else sees, and which go with it."""

    def apart() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS):
            os._exit(NO_MOUNTS)
        _libc_mount(None, Path("/"), None, RECURSIVE | PRIVATE)
        act()

    code = in_child(apart)
    if code == NO_MOUNTS:
        pytest.skip("this machine does not let root mount")
    return code


NO_MOUNTS = 99


def _read_only(path: Path) -> None:
    _libc_mount(str(path), path, None, BIND)
    _libc_mount(None, path, None, BIND | REMOUNT | READ_ONLY)


@needs_root
def test_a_read_only_input_is_enough_and_a_read_only_output_is_an_error_that_says_so(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Scenario("convert"))
    stage.reset()

    def read_only_input() -> None:
        _read_only(tmp_path / "source")
        stage.run()
        assert stage.state() == "new"

    def read_only_output() -> None:
        _read_only(stage.out.parent)
        with pytest.raises(StorageError, match=rf"{stage.out.parent}.*Read-only file system") as raised:
            stage.run()
        assert raised.value.hint == "the file system is mounted read-only"
        raise raised.value

    assert _with_own_mounts(read_only_input) == 0
    stage.reset()
    assert _with_own_mounts(read_only_output) == StorageError.exit_code
    assert stage.beside() == []


def test_permissions_are_enough_to_read_and_an_error_that_names_the_place_where_not_to_write(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Scenario("convert"))
    stage.reset()
    for path in (tmp_path / "source").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "source").chmod(0o555)
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    stage.out.parent.chmod(0o777)

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        with pytest.raises(StorageError, match=rf"{shut}.*Permission denied"):
            convert(tmp_path / "source", shut / "out")
        stage.run()

    assert in_child(as_nobody) == 0
    assert stage.state() == "new"
    assert list(shut.iterdir()) == []


@needs_root
def test_a_disk_that_is_too_small_is_refused_and_one_that_fills_up_leaves_a_start_for_a_rerun(tmp_path: Path) -> None:
    stage = Stage(tmp_path, Scenario("convert"))
    stage.reset()

    def refused() -> None:
        _libc_mount("none", stage.out.parent, "tmpfs", 0, "size=64k")
        try:
            stage.run()
        finally:
            assert list(stage.out.parent.iterdir()) == []

    def filled_up() -> None:
        _libc_mount("none", stage.out.parent, "tmpfs", 0, "size=32k")
        with pytest.MonkeyPatch.context() as patch:
            # As when another program takes the space meanwhile.
            patch.setattr(bounds, "check_disk", lambda *_: None)
            with pytest.raises(StorageError, match=r"cannot (create|write) .*No space left on device") as raised:
                stage.run()
            assert "it resumes" in (raised.value.hint or "")
            assert stage.state() == "absent"
            _libc_mount("none", stage.out.parent, "tmpfs", REMOUNT, "size=1m")
            with counted_tasks() as count:
                stage.run()
        assert 0 < count() <= stage.tasks
        assert stage.state() == "new"
        raise raised.value

    assert _with_own_mounts(refused) == ResourceError.exit_code
    assert _with_own_mounts(filled_up) == StorageError.exit_code
