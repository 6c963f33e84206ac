"""Inputs that change while they are read, and outputs that lie where the input does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert, verify
from ckpt_tools.core.errors import (
    InputChangedError,
    NotFoundError,
    UsageError,
)
from ckpt_tools.engine import copy, execute
from tests.checkpoints import make_repository
from tests.robustness.scenarios import (
    Scenario,
    Stage,
    tree,
)

SNAPSHOT, CACHED = "models--org--name/snapshots/0123abc", "models--org--name/blobs"


def _replace(path: Path) -> None:
    """Another file of the same size and time under the same name."""
    status = path.stat()
    twin = path.with_name("twin")
    twin.write_bytes(bytes(status.st_size))
    os.utime(twin, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.rename(twin, path)


def _rewrite(path: Path) -> None:
    """Other bytes in the same file."""
    with open(path, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(bytes(10))
    os.utime(path, ns=(1, time.time_ns()))


CHANGES: dict[str, Callable[[Path], None]] = {
    "replaced": _replace,
    "rewritten": _rewrite,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 4000),
    "removed": os.unlink,
}


@pytest.mark.parametrize("moment", ["planned", "half read"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "config.json"])
def test_an_input_that_changes_after_its_header_was_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: str, moment: str
) -> None:
    if file == "config.json" and change == "truncated":
        pytest.skip("it is not that long")
    stage = Stage(tmp_path, Scenario("convert"))
    stage.reset()
    path = tmp_path / "source" / file
    owner, name = (copy, "check_room") if moment == "planned" else (execute, "run_task")
    real, done = getattr(owner, name), []

    def meddling(*arguments: object) -> object:
        result = real(*arguments)
        if not done:
            done.append(CHANGES[change](path))
        return result

    monkeypatch.setattr(owner, name, meddling)
    with pytest.raises((InputChangedError, NotFoundError), match=file):
        stage.run()
    assert done
    assert stage.state() == "absent"
    assert file == "config.json" or stage.beside() == [], "what was read of a changed input is no start for a rerun"


def test_a_side_file_that_grows_while_it_is_copied_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path, Scenario("convert"))
    stage.reset()
    path = tmp_path / "source" / "tokenizer.json"
    preadv = os.preadv

    def meddling(fd: int, views: list[memoryview], position: int) -> int:
        if os.readlink(f"/proc/self/fd/{fd}") == str(path):
            path.write_bytes(path.read_bytes() + b" ")
        return preadv(fd, views, position)

    monkeypatch.setattr(os, "preadv", meddling)
    with pytest.raises(InputChangedError, match="tokenizer"):
        stage.run()
    assert stage.state() == "absent"


def test_a_blob_of_the_hub_cache_that_is_exchanged_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_repository(tmp_path / "plain")
    cache = tmp_path / "models--org--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "native")
    verify(tmp_path / "native", against=snapshot)
    blob = next(snapshot.glob("*.safetensors")).resolve()
    real = execute.run_task
    monkeypatch.setattr(execute, "run_task", lambda *arguments: (_replace(blob), real(*arguments))[1])
    with pytest.raises(InputChangedError, match="changed while it was being read"):
        convert(snapshot, tmp_path / "again", threads=1)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("source", "output"),
    [("a", "a"), ("a/b", "a"), ("link", "a"), (".a.ckpt-staging", "a"), ("native", "native/hf"), (SNAPSHOT, CACHED)],
)
def test_an_output_that_holds_what_is_read_is_refused(tmp_path: Path, source: str, output: str) -> None:
    work = tmp_path / "work"
    work.mkdir()
    where = work / {"link": "a", SNAPSHOT: CACHED}.get(source, source)
    where.parent.mkdir(exist_ok=True)
    plain = make_repository(where if source != "native" else tmp_path / "plain")
    if source == "native":
        convert(plain, where)
    if source == "link":
        (work / "link").symlink_to("a")
    if source == SNAPSHOT:
        (work / SNAPSHOT).mkdir(parents=True)
        for path in plain.iterdir():
            (work / SNAPSHOT / path.name).symlink_to(path)
    before = tree(work)
    run = consolidate if source == "native" else convert
    with pytest.raises(UsageError, match="would replace"):
        run(work / source, work / output, overwrite=True)
    assert tree(work) == before


def test_an_output_inside_its_source_leaves_the_source_as_it_was(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source")
    before = tree(source)
    for _ in range(2):
        convert(source, source / "native", overwrite=True)
    after = tree(source)
    assert {name: after[name] for name in before} == before
    verify(source / "native", against=source)
