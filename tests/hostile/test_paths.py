"""Names in the documents of a checkpoint lead nowhere but into it, under the rules of POSIX and of Windows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert, verify
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import CkptError, FormatError, UsageError
from ckpt_tools.core.paths import safe_join
from ckpt_tools.families import get_family
from ckpt_tools.formats.hf import INDEX
from ckpt_tools.formats.hub import resolve_source
from tests.checkpoints import tensor_bytes, write_repository
from tests.hostile.canary import untouched
from tests.hostile.specimens import SPECIMENS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify and /proc")

CLIMBING = ("../outside/secret.safetensors", "a/../../outside/secret.safetensors", "./../outside/secret.safetensors")
NOT_PLAIN = (
    *("", ".", "..", "/", "//x", "/etc/passwd", "a//b", "a/./b", "a/", "./a", "../a", "a/..", "a/../b"),
    *("..\\a", "a\\b", "\\\\server\\share\\x", "C:\\x", "C:x", "c:/x", "a:b", "a:$DATA", "\\\\?\\C:\\x"),
    *("CON", "con.safetensors", "a/NUL", "nul .txt", "COM1", "lpt9.json", "AUX.tar.gz", "COM\u00b9", "CONIN$"),
    *("a.", "a ", "a./b", "a. ", "...", " ", "a?", "a*", 'a"b', "a<b", "a|b"),
    *("a\0b", "a\nb", "a\x7fb", "\x1b[2J", "a\u202eb", "a\u200bb", "\ud800", "e\u0301", "\ufb01/../x"),
    *("x" * 256, "é" * 128, "/".join(["x" * 200] * 10)),
)
PLAIN = (
    "a",
    "a/b",
    "a.b",
    ".a",
    "a b",
    "model-00001-of-00002.safetensors",
    "__0_0.distcp",
    "é",
    "模型",
    "CONFIG",
    "com",
)


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_a_name_that_is_not_plain_on_every_system_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match="not a plain relative path"):
        safe_join(Path("/root"), name, named_by="index")


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_name_is_taken(name: str) -> None:
    assert safe_join(Path("/root"), name, named_by="index") == Path("/root") / name


def _in_index(root: Path, name: str) -> None:
    index = {"weight_map": {"stolen": name if name.endswith(".safetensors") else f"{name}.safetensors"}}
    (root / INDEX).write_text(json.dumps(index))


def _in_metadata(root: Path, name: str) -> None:
    path = root / ".metadata"
    for file in root.glob("*.distcp"):
        old, new = file.name.encode(), name.encode("utf-8", "surrogatepass")
        data = path.read_bytes().replace(len(old).to_bytes(4, "little") + old, len(new).to_bytes(4, "little") + new)
        path.write_bytes(data)


def _in_side_files(root: Path, name: str) -> None:
    _change_manifest(root, side_files={name: "0" * 32})


def _in_blobs(root: Path, name: str) -> None:
    _change_manifest(root, blobs={name: [[0, 4, "0" * 32]]})


def _change_manifest(root: Path, **fields: object) -> None:
    path = root / "ckpt-manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("specimen", "put"),
    [
        ("hf sharded", _in_index),
        ("dcp", _in_metadata),
        ("hf", _in_side_files),
        ("dcp", _in_side_files),
        ("training save", _in_blobs),
    ],
)
def test_no_document_of_a_checkpoint_names_a_file_outside(
    tmp_path: Path, outside: Path, specimen: str, put: Callable[[Path, str], None]
) -> None:
    root = SPECIMENS[specimen](tmp_path)
    documents = {path: path.read_bytes() for path in root.iterdir() if path.suffix in (".json", "") and path.is_file()}
    odd = ("", "C:\\x", "..\\..\\outside\\victim", "CON", "a:b", "a.", "x\0y", "\ud800", "x" * 256)
    for name in (*CLIMBING, str(outside / "secret.safetensors"), *odd):
        for path, data in documents.items():
            path.write_bytes(data)
        put(root, name)
        with untouched(outside), pytest.raises(CkptError):
            verify(root)
    with untouched(outside), pytest.raises(CkptError):
        convert(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_tensors_are_never_names_of_files(tmp_path: Path, outside: Path) -> None:
    names = ("../../outside/victim", "/etc/passwd", "..", "C:\\x", "CON", "a/b/../c", "outside/victim")
    source = write_repository(tmp_path / "source", dict.fromkeys(names, (DTYPES["F32"], (4,))), max_shard_size=16)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with untouched(outside):
        convert(source, tmp_path / "work" / "native")
        convert(source, tmp_path / "work" / "sharded", file_format="safetensors")
        consolidate(tmp_path / "work" / "native", tmp_path / "work" / "back", max_shard_size=16, family="identity")
    assert tensor_bytes(tmp_path / "work" / "back") == tensor_bytes(source)
    assert [p for p in sorted(map(str, tmp_path.rglob("*"))) if "/work" not in p] == before


@pytest.mark.parametrize(
    "name", ["../../outside", "os", "decoder", "family", "qwen3.shape", ".", "/etc/passwd", "__init__"]
)
def test_a_family_is_one_of_the_list_and_never_a_module_by_another_name(name: str) -> None:
    with pytest.raises(UsageError, match="there is no family"):
        get_family(name)


@pytest.mark.parametrize(
    "revision", ["..", "../../../x", "/abs", "a/../b", ".hidden", "a//b", "a\\b", "a\x1bb", "a/.."]
)
def test_a_revision_that_is_no_name_is_refused_before_the_hub_is_asked(revision: str) -> None:
    for ask in (lambda: resolve_source(f"org/name@{revision}"), lambda: resolve_source("org/name", revision=revision)):
        with pytest.raises(UsageError, match="cannot be the name of a revision"):
            ask()


def test_the_canary_sings(outside: Path) -> None:
    """Else the tests above would say nothing."""
    for touch in (
        (outside / "victim").read_bytes,
        (outside / "new").touch,
        (outside / "secret.json").unlink,
        lambda: subprocess.run(["cat", str(outside / "victim")], check=True, capture_output=True),
    ):
        with pytest.raises(AssertionError, match="touched outside"), untouched(outside):
            touch()
