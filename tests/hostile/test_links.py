"""Links and special files of a checkpoint, and links where an output is made: none leads out, none is waited for."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckpt_tools import convert, inspect, verify
from ckpt_tools.core import paths
from ckpt_tools.core.errors import CkptError, FormatError, UsageError
from ckpt_tools.core.paths import open_input
from ckpt_tools.engine.staging import Staging
from ckpt_tools.formats.hf import INDEX, SideFile
from tests.checkpoints import make_repository
from tests.hostile.canary import untouched
from tests.hostile.specimens import SPECIMENS, contents

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify and /proc")

LINKED = [
    ("hf", "model.safetensors"),
    ("hf", "config.json"),
    ("hf", "tokenizer.json"),
    ("hf", "ckpt-manifest.json"),
    ("hf sharded", "model-00002-of-00004.safetensors"),
    ("hf sharded", INDEX),
    ("dcp", ".metadata"),
    ("dcp", "__0_0.distcp"),
    ("dcp", "hf/config.json"),
    ("dcp", "hf/tokenizer.json"),
    ("dcp", "hf"),
    ("sharded safetensors", "shard-00002-model-00001-of-00001.safetensors"),
]


@pytest.mark.parametrize(("specimen", "name"), LINKED)
def test_a_link_out_of_a_checkpoint_is_refused_and_not_opened(
    tmp_path: Path, outside: Path, specimen: str, name: str
) -> None:
    """The file behind the link is the right one, so nothing but the rule can refuse it."""
    root = SPECIMENS[specimen](tmp_path)
    (root / name).rename(outside / "right")
    (root / name).symlink_to(outside / "right")
    for act in (inspect, verify, lambda at: convert(at, tmp_path / "out")):
        with untouched(outside), pytest.raises(FormatError, match="link"):
            act(root)
    (root / name).unlink()
    (root / name).symlink_to("loop" if name != "hf" else "nowhere")
    with pytest.raises(CkptError):
        verify(root)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("specimen", "name"), [pair for pair in LINKED if pair[1] != "hf"])
def test_a_link_that_stays_in_the_checkpoint_is_followed(tmp_path: Path, specimen: str, name: str) -> None:
    root = SPECIMENS[specimen](tmp_path)
    expected = contents(root)
    kept = (root / name).parent / "kept"
    kept.mkdir()
    (root / name).rename(kept / "right.bin")
    (root / name).symlink_to("kept/right.bin")
    assert contents(root) == expected
    verify(root)


def hub_cache(root: Path, cache: Path) -> Path:
    """`root` as the Hub cache holds it: a snapshot of links to blobs."""
    home = cache / "models--org--name"
    snapshot = home / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (home / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in root.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(home / "blobs" / f"{number:040x}")
        link.symlink_to(os.path.relpath(home / "blobs" / f"{number:040x}", link.parent))
    return snapshot


@pytest.mark.parametrize("specimen", ["hf", "hf sharded", "dcp of a mesh", "sharded safetensors"])
def test_the_links_of_the_hub_cache_are_followed_to_its_blobs_and_no_further(
    tmp_path: Path, outside: Path, specimen: str
) -> None:
    root = SPECIMENS[specimen](tmp_path)
    expected = contents(root)
    snapshot = hub_cache(root, tmp_path / "cache")
    assert contents(snapshot) == expected
    convert(snapshot, tmp_path / "copy")
    (tmp_path / "linked").symlink_to(tmp_path / "cache")
    linked = tmp_path / "linked" / snapshot.relative_to(tmp_path / "cache")
    assert contents(linked) == expected, "the cache may lie behind a link of the user's"
    blob = next(iter(sorted((tmp_path / "cache" / "models--org--name" / "blobs").iterdir())))
    blob.rename(outside / "right")
    blob.symlink_to(outside / "right")
    with untouched(outside), pytest.raises(FormatError, match="outside of the checkpoint"):
        verify(snapshot)


@pytest.fixture(params=["pipe", "socket", "device", "directory"])
def special(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    held = []

    def make(path: Path) -> None:
        path.unlink()
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "socket":
            held.append(socket.socket(socket.AF_UNIX))
            # The name of a socket has at most 107 characters.
            monkeypatch.chdir(path.parent)
            held[-1].bind(path.name)
        elif request.param == "device":
            try:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
            except PermissionError:
                pytest.skip("devices can be made by root only")
        else:
            path.mkdir()

    yield make
    for one in held:
        one.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("specimen", "name"), [pair for pair in LINKED if not pair[1].endswith(("hf", "tokenizer.json"))]
)
def test_a_special_file_in_place_of_a_file_is_refused_and_never_waited_for(
    tmp_path: Path, specimen: str, name: str, special: Callable[[Path], None]
) -> None:
    root = SPECIMENS[specimen](tmp_path)
    special(root / name)
    path = root / name
    for act in (inspect, verify, lambda at: convert(at, tmp_path / "out")):
        with untouched(path.parent, path.name), pytest.raises(FormatError, match=r"is a directory|not a regular file"):
            act(root)


@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_what_is_exchanged_for_a_link_between_check_and_opening_is_not_followed(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    root = tmp_path / "made"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "victim").write_text("right")
    os.close(open_input(root / "sub" / "victim", root))
    real_stat = os.stat

    def swap(name: str, **where: object) -> os.stat_result:
        found = real_stat(name, **where)  # type: ignore[arg-type]
        if name == "victim" and swapped == "file":
            (root / "sub" / "victim").unlink()
            (root / "sub" / "victim").symlink_to(outside / "victim")
        if name == "sub" and swapped == "folder":
            (root / "sub").rename(root / "away")
            (root / "sub").symlink_to(outside)
        return found

    monkeypatch.setattr(paths.os, "stat", swap)
    with untouched(outside), pytest.raises(FormatError, match=r"link|not a directory"):
        open_input(root / "sub" / "victim", root)


def test_a_file_that_is_exchanged_for_a_link_during_a_copy_does_not_reach_the_output(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side files are listed when the source is opened and read after the tensors."""
    source = make_repository(tmp_path / "source", "qwen3")
    copy = Staging.copy_document

    def late(self: Staging, name: str, file: SideFile) -> str:
        if file.name == "tokenizer.json" and not (source / "tokenizer.json").is_symlink():
            (source / "tokenizer.json").unlink()
            (source / "tokenizer.json").symlink_to(outside / "secret.json")
        return copy(self, name, file)

    monkeypatch.setattr(Staging, "copy_document", late)
    with untouched(outside), pytest.raises(FormatError, match="outside of the checkpoint"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["out", ".out.ckpt-lock", ".out.ckpt-staging", ".out.ckpt-staging/.ckpt-journal",
                                   ".out.ckpt-staging/hf", ".out.ckpt-staging/__0_0.distcp"])  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_planted_where_an_output_is_made_is_not_followed(
    tmp_path: Path, outside: Path, where: str, overwrite: bool
) -> None:
    source = make_repository(tmp_path / "source", "qwen3")
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).symlink_to(outside if where.endswith(("out", "staging", "hf")) else outside / "victim")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    with untouched(outside):
        try:
            convert(source, tmp_path / "out", overwrite=overwrite)
        except CkptError:
            assert where in ("out", ".out.ckpt-lock", ".out.ckpt-staging")
        else:
            verify(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


@pytest.mark.timeout(60)
def test_a_pipe_planted_as_journal_is_not_waited_for(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3")
    (tmp_path / ".out.ckpt-staging").mkdir()
    os.mkfifo(tmp_path / ".out.ckpt-staging" / ".ckpt-journal")
    convert(source, tmp_path / "out")
    verify(tmp_path / "out")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_staging_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3")
    (tmp_path / ".out.ckpt-staging").mkdir()
    os.chown(tmp_path / ".out.ckpt-staging", 12345, 12345)
    with pytest.raises(UsageError, match="belongs to another user"):
        convert(source, tmp_path / "out")


def test_a_hard_link_at_an_old_output_keeps_its_other_name(tmp_path: Path, outside: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3")
    convert(source, tmp_path / "out")
    (tmp_path / "out" / "__0_0.distcp").unlink()
    os.link(outside / "victim", tmp_path / "out" / "__0_0.distcp")
    convert(source, tmp_path / "out", overwrite=True)
    assert (outside / "victim").read_text() == '{"secret": 1}'
    verify(tmp_path / "out")
