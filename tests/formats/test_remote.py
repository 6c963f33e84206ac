"""Checkpoints behind URLs: the same results as from a directory, few requests, and faults that are survived or said."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert, diff, explain, inspect, plan, verify
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import (
    CkptError,
    FormatError,
    InputChangedError,
    MismatchError,
    NotFoundError,
    ResourceError,
    StorageError,
    UsageError,
)
from ckpt_tools.engine import execute, ranges, sharing
from ckpt_tools.engine.bounds import CopyOptions
from ckpt_tools.engine.checkpoint import open_checkpoint
from ckpt_tools.engine.copy import run_plan
from ckpt_tools.engine.files import FileReader
from ckpt_tools.engine.manifest import Manifest
from ckpt_tools.engine.ranges import RangeReader
from ckpt_tools.engine.sides import native_side_files
from ckpt_tools.engine.targets import plan_native
from ckpt_tools.formats import remote
from ckpt_tools.formats.remote import open_remote
from tests.checkpoints import make_repository, tensor_bytes, write_repository
from tests.engine.file_systems import BLOCK, stand_in
from tests.engine.test_ranks import together
from tests.object_store import ObjectStore, object_store

fsspec = pytest.importorskip("fsspec")
Put = Callable[[Path], str]
bucket = (f"bucket{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as started:
        yield started


@pytest.fixture
def store(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The server, whole, with no requests counted; S3's clients are told where it is."""
    server.ranges, server.page = True, None
    server.fault = lambda *_: None
    server.busy = 0
    server.requests.clear()
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.002)
    return server


@pytest.fixture(params=["memory", "file", "http", "s3"])
def put(request: pytest.FixtureRequest, store: ObjectStore) -> Put:
    """Makes a directory reachable, and gives its URL."""

    def upload(folder: Path) -> str:
        name = f"{next(bucket)}/{folder.name}"
        if request.param == "file":
            return f"file://{folder}"
        if request.param == "memory":
            for path in folder.rglob("*"):
                if path.is_file():
                    fsspec.filesystem("memory").pipe_file(f"/{name}/{path.relative_to(folder)}", path.read_bytes())
            return f"memory://{name}"
        pytest.importorskip("aiohttp" if request.param == "http" else "s3fs")
        store.put(name, folder)
        return f"{store.url}/{name}" if request.param == "http" else f"s3://{name}"

    return upload


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("remote") / "source", vocab_size=512)


@pytest.fixture
def web(store: ObjectStore, source: Path) -> str:
    """The URL of the repository on the server."""
    pytest.importorskip("aiohttp")
    name = f"{next(bucket)}/model"
    store.put(name, source)
    return f"{store.url}/{name}"


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "ckpt-manifest.json"
    }


def test_blocks_are_never_shared_with_the_shell_of_a_remote_source(
    tmp_path: Path, web: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "WORTH", BLOCK)
    double = stand_in(monkeypatch)
    assert convert(web, tmp_path / "native", reflink="auto").shared == plan(web).shared == double.calls == 0
    assert tensor_bytes(source) == tensor_bytes(_back(tmp_path / "native"))
    with pytest.raises(UsageError, match=f"{web} cannot share blocks"):
        convert(web, tmp_path / "always", reflink="always")
    # Nor where a plan comes with shared leaves.
    made = plan_native(
        open_checkpoint(open_remote(web).root),
        mesh=None,
        file_format="dcp",
        dtype=None,
        max_file_size=10**9,
        block=BLOCK,
    )
    assert made.sharing.nbytes()
    manifest, side_files = Manifest("qwen3_moe", 1, made.side, "a test"), native_side_files(made.source)
    with pytest.raises(UsageError, match="cannot share blocks"):
        run_plan(made, tmp_path / "planned", manifest, side_files, CopyOptions(strict=True))
    assert run_plan(made, tmp_path / "planned", manifest, side_files, CopyOptions()).shared == double.calls == 0
    assert tensor_bytes(source) == tensor_bytes(_back(tmp_path / "planned"))
    with FileReader(made.source.root) as reader, pytest.raises(ValueError, match="remote and has no descriptor"):
        reader.descriptor(next(iter(made.source.store.files)))


def _back(native: Path) -> Path:
    """The repository made out of a native checkpoint."""
    consolidate(native, native.with_name(f"{native.name}-back"), reflink="never")
    return native.with_name(f"{native.name}-back")


def test_every_verb_reads_a_url_as_it_reads_a_directory(tmp_path: Path, source: Path, put: Put) -> None:
    url = put(source)
    assert inspect(url).groups == inspect(source).groups
    assert plan(url, mesh="ep=2").nbytes == plan(source, mesh="ep=2").nbytes
    assert explain(url, "lm_head.weight") == explain(source, "lm_head.weight")
    assert diff(url, source) == []
    report = convert(url, tmp_path / "native", mesh="dp_shard=2,ep=2")
    convert(source, tmp_path / "local", mesh="dp_shard=2,ep=2")
    assert report.source == url
    assert json.loads((tmp_path / "native/ckpt-manifest.json").read_bytes())["source"] == {"url": url}
    assert contents(tmp_path / "native") == contents(tmp_path / "local")

    native = put(tmp_path / "native")
    consolidate(native, tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)
    assert len(verify(native, against=url).checks) == 4


def test_sharded_safetensors_are_read_too(tmp_path: Path, source: Path, put: Put) -> None:
    convert(source, tmp_path / "native", mesh="dp_shard=3", file_format="safetensors")
    consolidate(put(tmp_path / "native"), tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)


def test_headers_come_in_one_request_a_file_and_many_at_a_time(tmp_path: Path, store: ObjectStore) -> None:
    pytest.importorskip("s3fs")
    tensors = {f"layers.{i}.weight": (DTYPES["BF16"], (64, 64)) for i in range(80)}
    source = write_repository(tmp_path / "source", tensors, {}, max_shard_size=8192)
    name = f"{next(bucket)}/model"
    store.put(name, source)
    store.fault = lambda *_: time.sleep(0.03)  # type: ignore[func-returns-value]
    assert inspect(f"s3://{name}").tensors == 80
    assert len(list(source.glob("*.safetensors"))) == 80
    assert len(store.requests) == 80 + 4 + 1  # headers, small files, one listing
    assert store.busy > 3
    store.requests.clear()
    pytest.importorskip("aiohttp")
    assert inspect(f"{store.url}/{name}").tensors == 80
    assert len(store.requests) == 2 * (80 + 4) + 1  # HTTP has no listing with sizes


def test_a_long_header_takes_a_second_request(
    tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setattr(remote, "_HEADER_GUESS", 100)
    source = write_repository(tmp_path / "source", {"x": (DTYPES["F32"], (5, 5))}, {})
    store.put("long/model", source)
    consolidate("s3://long/model", tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)
    spans = [span for _, path, span in store.requests if path.endswith(".safetensors")]
    assert spans == ["bytes=0-99", "bytes=100-4095", "bytes=0-4195"]


def test_every_byte_is_fetched_once_and_little_is_held(
    tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setattr(ranges, "BLOCK", 4096)
    monkeypatch.setattr(ranges, "ROOM", 20 * 4096)
    source = write_repository(tmp_path / "source", {f"x{i}": (DTYPES["F32"], (64, 64)) for i in range(9)}, {})
    store.put("once/model", source)
    held = []
    block = RangeReader._block

    def watched(self: RangeReader, file: str, number: int) -> object:
        found = block(self, file, number)
        held.append(len(self._blocks))
        return found

    monkeypatch.setattr(RangeReader, "_block", watched)
    open_remote("s3://once/model")
    store.requests.clear()
    consolidate("s3://once/model", tmp_path / "out", threads=4)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)
    spans = [(path, span) for _, path, span in store.requests if path.endswith(".safetensors")]
    assert len(spans) == len(set(spans))
    assert 10 < max(held) <= 20


@pytest.mark.parametrize("fault", [503, 429, "drop", "short"])
def test_faults_that_pass_are_survived(
    tmp_path: Path, source: Path, store: ObjectStore, web: str, fault: int | str
) -> None:
    turn = itertools.count()
    store.fault = lambda method, _, __: fault if method == "GET" and next(turn) % 3 == 1 else None
    convert(web, tmp_path / "out")
    verify(tmp_path / "out", against=source)


@pytest.mark.parametrize(
    ("fault", "said", "attempts"),
    [
        (500, "Internal Server Error", remote.ATTEMPTS),
        ("drop", r"\(5 attempts\)", remote.ATTEMPTS),
        ("short", "bytes came in place of", remote.ATTEMPTS),
        (403, "Forbidden", 1),
    ],
)
def test_faults_that_stay_are_said_with_the_file(
    tmp_path: Path, store: ObjectStore, web: str, fault: int | str, said: str, attempts: int
) -> None:
    open_remote(web)
    store.requests.clear()
    victim = min(path for path in store.objects if path.startswith(web[len(store.url) :]) and "safetensors" in path)
    store.fault = lambda method, path, _: fault if method == "GET" and path == victim else None
    with pytest.raises(StorageError, match=said) as caught:
        convert(web, tmp_path / "out", threads=1)
    assert f"{store.url}{victim}" in caught.value.message
    assert sum((method, path) == ("GET", victim) for method, path, _ in store.requests) == attempts
    assert not (tmp_path / "out").exists()


def test_a_server_without_ranges_is_refused_and_its_files_are_not_taken_whole(
    tmp_path: Path, store: ObjectStore, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "BLOCK", 4096)
    store.ranges = False
    with pytest.raises(StorageError, match="does not serve ranges of bytes"):
        convert(web, tmp_path / "out")


@pytest.mark.parametrize("put", ["memory", "http", "s3"], indirect=True)
@pytest.mark.parametrize("kind", ["tensors", "config"])
def test_an_input_that_changes_is_detected(
    tmp_path: Path, source: Path, put: Put, store: ObjectStore, kind: str
) -> None:
    url = put(source)
    run, (scheme, _, name) = execute.run_task, url.partition("://")
    report = convert(url, tmp_path / "fine")
    assert report.tensors
    path = "config.json" if kind == "config" else sorted(source.glob("*.safetensors"))[0].name
    data = (source / path).read_bytes()
    changed = data[:-1] + bytes([data[-1] ^ 1])

    def change(*arguments: object) -> object:
        if scheme == "memory":
            fsspec.filesystem("memory").pipe_file(f"/{name}/{path}", changed)
        else:
            store.objects[f"/{name.removeprefix(store.url[7:] + '/')}/{path}"] = changed
        return run(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "run_task", change)
        with pytest.raises(InputChangedError, match=f"{path} changed while it was being read"):
            convert(url, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FormatError if kind == "config" else MismatchError):
        verify(tmp_path / "fine", against=url)


def test_several_ranks_read_a_url_together(tmp_path: Path, source: Path, web: str) -> None:
    ended = together(2, tmp_path / "out", lambda ranks: convert(web, tmp_path / "out", ranks=ranks))
    assert [type(report).__name__ for report in ended] == ["CopyReport", "CopyReport"], ended
    verify(tmp_path / "out", against=source)


def test_an_interrupted_run_resumes(tmp_path: Path, source: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, done = execute.run_task, itertools.count()

    def dying(*arguments: object) -> object:
        if next(done) == 20:
            raise KeyboardInterrupt
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(execute, "run_task", dying)
    with pytest.raises(KeyboardInterrupt):
        convert(web, tmp_path / "out", threads=1)
    monkeypatch.setattr(remote, "_opened", {})  # as in a new process
    redone = itertools.count()
    monkeypatch.setattr(execute, "run_task", lambda *arguments: (next(redone), run(*arguments))[1])
    report = convert(web, tmp_path / "out", threads=1)
    assert next(redone) == report.tensors - 20
    verify(tmp_path / "out", against=source)


def test_errors_name_the_url_and_not_the_shell(tmp_path: Path, store: ObjectStore, web: str) -> None:
    lost = next(path for path in store.objects if path.startswith(web[len(store.url) :]) and "00001-of" in path)
    del store.objects[lost]
    with pytest.raises(FormatError, match="the index lists this file") as caught:
        inspect(web)
    assert caught.value.message.startswith(f"{web} is not a whole repository")
    with pytest.raises(NotFoundError, match="nothing/here holds no files"):
        convert(f"{store.url}/nothing/here", tmp_path / "out")


@pytest.mark.parametrize("status", [403, 200])
def test_without_a_page_of_links_the_usual_names_and_what_they_name_are_asked_for(
    tmp_path: Path, source: Path, store: ObjectStore, web: str, status: int
) -> None:
    convert(source, tmp_path / "native", mesh="dp_shard=2")
    name = f"{next(bucket)}/native"
    store.put(name, tmp_path / "native")
    store.page = lambda _: (status, b"<a href='elsewhere.html'>Welcome</a>")
    consolidate(f"{store.url}/{name}", tmp_path / "back")
    convert(web, tmp_path / "again", mesh="dp_shard=2")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)
    assert contents(tmp_path / "again") == contents(tmp_path / "native")
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_page_of_links_that_fails_is_not_taken_for_none(store: ObjectStore, web: str) -> None:
    store.fault = lambda _, path, __: 500 if path.endswith("/") else None
    with pytest.raises(StorageError, match="Internal Server Error"):
        inspect(web)


def test_a_key_that_leaves_the_directory_is_refused() -> None:
    fsspec.filesystem("memory").pipe_file("/hostile/model/a\\..\\..\\escaped", b"x")
    with pytest.raises(FormatError, match="not a plain relative path"):
        inspect("memory://hostile/model")


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        ("nope://bucket/model", UsageError, "Protocol not known"),
        ("memory://nowhere/model", NotFoundError, "holds no files"),
    ],
)
def test_urls_that_cannot_be_read(url: str, kind: type[CkptError], said: str) -> None:
    with pytest.raises(kind, match=said):
        inspect(url)


def test_credentials_in_a_url_are_not_repeated(web: str) -> None:
    assert open_remote(web.replace("//", "//user:secret@")).url == web


def test_the_bound_of_memory_counts_the_blocks(web: str) -> None:
    with pytest.raises(ResourceError, match="one thread needs"):
        plan(web, memory="64MB")
    assert plan(web, memory="1GB", threads=1).memory > ranges.ROOM


def test_a_reader_that_is_closed_leaves_no_threads(web: str) -> None:
    opened = open_remote(web)
    reader = RangeReader(opened)
    file = next(name for name in opened.versions if name.endswith(".safetensors"))
    data = bytearray(8)
    reader.read(file, 0, memoryview(data))
    assert bytes(data) == (opened.root / file).read_bytes()[:8]
    reader.close()
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("ckpt-range", "ckpt-remote"))]
