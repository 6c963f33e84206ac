"""Sharing blocks with the source: bit for bit what copying gives, on real file systems and on a stand-in for them."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools import CopyReport, consolidate, convert, plan, verify
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import CkptError, InputChangedError, MismatchError, ResourceError, StorageError, UsageError
from ckpt_tools.engine import cloning, sharing
from ckpt_tools.engine.bounds import CopyOptions
from ckpt_tools.engine.checkpoint import open_checkpoint
from ckpt_tools.engine.copy import run_plan
from ckpt_tools.engine.manifest import Manifest, read_manifest
from ckpt_tools.engine.plan import Plan
from ckpt_tools.engine.sharding import parse_mesh
from ckpt_tools.engine.sharing import NOTHING, Span, split_rows
from ckpt_tools.engine.targets import plan_native
from tests.checkpoints import make_repository, tensor_bytes, write_repository
from tests.engine.file_systems import BLOCK, StandIn, mounted, stand_in

SIZES: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 96, "intermediate_size": 256, "vocab_size": 256}
MESH = "dp_shard=2,ep=2"


@pytest.fixture(autouse=True)
def _small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "WORTH", BLOCK)
    monkeypatch.setattr(sharing, "SPLIT", 2 * BLOCK)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return stand_in(monkeypatch)


@pytest.fixture(scope="module", params=["stand-in", "xfs", "btrfs"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a file system that shares blocks, or on one where a stand-in does."""
    folder = tmp_path_factory.mktemp("disk")
    if request.param != "stand-in":
        with mounted(request.param, folder) as mount:
            yield mount
        return
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        yield folder


@pytest.fixture
def root(disk: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=disk))
    yield folder
    shutil.rmtree(folder)


def published(root: Path, *, files: int = 3, header: int = 8, **config: Any) -> Path:
    """A repository as others publish it: tensors by name, packed behind headers of any multiple of 8 bytes."""
    ours = make_repository(root.with_name(f"{root.name}-ours"), **{**SIZES, **config})
    values, tensors = tensor_bytes(ours), open_checkpoint(ours).store.tensors
    names = sorted(values)
    root.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(ours / name, root / name)
    shutil.rmtree(ours)
    weight_map = {}
    for number in range(files):
        part = names[number * len(names) // files : (number + 1) * len(names) // files]
        described, end = {}, 0
        for name in part:
            begin, end = end, end + len(values[name])
            tensor = tensors[name]
            described[name] = {"dtype": tensor.dtype.name, "shape": tensor.shape, "data_offsets": [begin, end]}
        text = json.dumps({"__metadata__": {"format": "pt"}, **described}).encode()
        text += b" " * (-len(text) % 8 + 8 * number + header)
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        (root / file).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values[name] for name in part))
        weight_map.update(dict.fromkeys(part, file))
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def ours(root: Path, **config: Any) -> Path:
    return make_repository(root, **{**SIZES, **config})


def share_of(report: CopyReport) -> float:
    return report.shared / report.nbytes


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def digests_of(root: Path) -> dict[str, str]:
    manifest = read_manifest(root)
    assert manifest is not None
    return manifest.tensors or {}


def run(made: Plan, destination: Path, **options: Any) -> dict[str, bytes]:
    """The files with tensors that a plan makes."""
    manifest = Manifest("qwen3_moe", 1, made.side, "a test")
    run_plan(made, destination, manifest, {}, CopyOptions(**options))
    return {name: data for name, data in contents(destination).items() if not name.startswith("ckpt-manifest")}


@pytest.mark.parametrize("file_format", ["dcp", "safetensors"])
@pytest.mark.parametrize("mesh", [None, MESH, "dp_shard=3"])
def test_shared_files_equal_copied_ones_byte_for_byte(root: Path, mesh: str | None, file_format: Any) -> None:
    source = open_checkpoint(published(root / "source"))
    made = plan_native(
        source,
        mesh=None if mesh is None else parse_mesh(mesh),
        file_format=file_format,
        dtype=None,
        max_file_size=10**6,
        block=BLOCK,
    )
    assert made.sharing.nbytes() > made.nbytes_written / 5
    assert run(made, root / "shared") == run(replace(made, sharing=NOTHING), root / "copied")


def test_there_and_back_every_step_shares_and_nothing_changes(root: Path) -> None:
    source = published(root / "source")
    expected = tensor_bytes(source)
    steps = [
        convert(source, root / "native"),
        convert(root / "native", root / "sharded", mesh=MESH),
        convert(root / "sharded", root / "whole", max_file_size=200_000),
        consolidate(root / "whole", root / "back", max_shard_size=500_000),
        convert(root / "back", root / "again", file_format="safetensors"),
    ]
    assert all(share_of(report) > 0.4 for report in steps), list(map(share_of, steps))
    for path in ("native", "sharded", "whole", "back", "again"):
        verify(root / path, against=source)
    assert tensor_bytes(root / "back") == expected


def test_our_own_files_share_nearly_everything(root: Path) -> None:
    source = ours(root / "source", vocab_size=4096)
    assert share_of(convert(source, root / "native", reflink="always")) > 0.9
    assert share_of(consolidate(root / "native", root / "back", reflink="always")) > 0.9
    assert tensor_bytes(root / "back") == tensor_bytes(source)


def test_the_source_can_be_changed_and_deleted_afterwards(root: Path) -> None:
    source = published(root / "source")
    assert convert(source, root / "native").shared
    before = contents(root / "native")
    for path in source.glob("*.safetensors"):
        with open(path, "r+b") as file:
            file.write(random.Random(0).randbytes(path.stat().st_size))
            os.fsync(file.fileno())
    assert contents(root / "native") == before
    shutil.rmtree(source)
    os.sync()
    assert contents(root / "native") == before
    # And the other way round: the output is no window onto its source.
    consolidate(root / "native", root / "back")
    kept = contents(root / "back")
    for path in (root / "native").glob("*.distcp"):
        path.write_bytes(bytes(path.stat().st_size))
    assert contents(root / "back") == kept


def test_holes_of_the_source_are_zeros(root: Path) -> None:
    source = ours(root / "source", vocab_size=2048)
    tensor = open_checkpoint(source).store.tensors["model.embed_tokens.weight"]
    (chunk,) = tensor.chunks
    data = (source / chunk.file).read_bytes()
    begin, end = chunk.position + 5 * BLOCK, chunk.position + tensor.nbytes - BLOCK
    with open(source / chunk.file, "wb") as file:
        file.write(data[:begin])
        file.seek(end)
        file.write(data[end:])
    assert convert(source, root / "native").shared
    consolidate(root / "native", root / "back")
    values = tensor_bytes(root / "back")
    assert values == tensor_bytes(source)
    assert bytes(end - begin) in values["model.embed_tokens.weight"]


@pytest.mark.parametrize("call", [0, 1, 7, 12])
def test_an_interrupted_run_resumes(root: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    source = published(root / "source")
    clone, calls = cloning.clone_range, [0]

    def dying(*arguments: int) -> bool:
        calls[0] += 1
        if calls[0] - 2 == call:  # the first one is the trial
            raise KeyboardInterrupt
        return clone(*arguments)

    monkeypatch.setattr(cloning, "clone_range", dying)
    with pytest.raises(KeyboardInterrupt):
        convert(source, root / "native")
    assert not (root / "native").exists()
    monkeypatch.setattr(cloning, "clone_range", clone)
    convert(source, root / "native")
    verify(root / "native", against=source)
    assert sorted(path.name for path in root.iterdir()) == ["native", "source"]


def test_an_existing_output_is_replaced(root: Path) -> None:
    source = published(root / "source")
    convert(source, root / "native", reflink="never")
    convert(source, root / "native", overwrite=True, mesh=MESH)
    verify(root / "native", against=source)


def test_one_thread_and_eight_share_alike(root: Path) -> None:
    source = published(root / "source")
    for threads in (1, 8):
        convert(source, root / f"native{threads}", threads=threads)
    assert contents(root / "native1") == contents(root / "native8")


def test_torch_and_safetensors_read_tensors_at_odd_places(root: Path) -> None:
    torch = pytest.importorskip("torch")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    safetensors = pytest.importorskip("safetensors")
    source = published(root / "source")
    convert(source, root / "native")
    native = open_checkpoint(root / "native").store
    positions = [chunk.position for tensor in native.tensors.values() for chunk in tensor.chunks]
    assert any(position % 64 for position in positions)
    assert any(len(tensor.chunks) > 1 for tensor in native.tensors.values())
    state = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in native.tensors.items()}
    dcp.load(state, checkpoint_id=root / "native", no_dist=True)
    consolidate(root / "native", root / "back")
    values = tensor_bytes(source)
    assert state["model.norm.weight"].view(torch.uint8).numpy().tobytes() == values["model.norm.weight"]
    for layer in (0, 2):
        for expert in range(4):
            gate_up = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert].view(torch.uint8).numpy()
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            parts = values[f"{name}.gate_proj.weight"], values[f"{name}.up_proj.weight"]
            assert gate_up.tobytes() == b"".join(parts)
    for path in (root / "back").glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                assert file.get_tensor(name).view(torch.uint8).numpy().tobytes() == values[name]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_shared_output_takes_no_room(tmp_path: Path, kind: str) -> None:
    with mounted(kind, tmp_path) as mount:
        source = published(mount / "source", vocab_size=65536)

        def used() -> int:
            os.sync()
            status = os.statvfs(mount)
            return (status.f_blocks - status.f_bfree) * status.f_frsize

        before = used()
        report = convert(source, mount / "native")
        assert report.nbytes > 30 << 20
        assert share_of(report) > 0.97
        assert used() - before < report.nbytes / 20


def test_where_blocks_cannot_be_shared_they_are_copied(tmp_path: Path, double: StandIn) -> None:
    source = published(tmp_path / "source")
    for code in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
        double.calls, double.fails = 0, {0: code}
        report = convert(source, tmp_path / "native", overwrite=True)
        assert (report.shared, report.undigested, double.calls) == (0, 0, 1)
        verify(tmp_path / "native", against=source)
        double.calls = 0
        with pytest.raises(UsageError, match="cannot share blocks") as caught:
            convert(source, tmp_path / "other", reflink="always")
        assert "--reflink auto" in str(caught.value.hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "source"]


def test_never_asks_for_nothing(tmp_path: Path, double: StandIn) -> None:
    source = published(tmp_path / "source")
    assert convert(source, tmp_path / "native", reflink="never").shared == 0
    assert double.calls == 0
    native = open_checkpoint(tmp_path / "native").store.tensors.values()
    assert all(chunk.position % BLOCK == 0 for tensor in native for chunk in tensor.chunks)
    with pytest.raises(UsageError, match="reflink is 'sometimes'"):
        convert(source, tmp_path / "other", reflink="sometimes")  # type: ignore[arg-type]


def test_always_refuses_a_model_of_which_nothing_can_be_shared(tmp_path: Path, double: StandIn) -> None:
    source = ours(tmp_path / "source")
    with pytest.raises(UsageError, match="no tensor"):
        convert(source, tmp_path / "native", dtype="float32", reflink="always")
    assert double.nbytes == BLOCK
    assert not (tmp_path / "native").exists()


def test_a_file_that_cannot_be_shared_is_copied_and_the_others_are_not(tmp_path: Path, double: StandIn) -> None:
    source = published(tmp_path / "source")
    planned = plan(source).shared
    double.refusing.add((source / "model-00002-of-00003.safetensors").stat().st_ino)
    report = convert(source, tmp_path / "native")
    assert 0 < report.shared < planned
    assert 0 < report.undigested < report.tensors
    verify(tmp_path / "native", against=source)
    with pytest.raises(UsageError, match=r"model-00002-of-00003\.safetensors cannot share"):
        convert(source, tmp_path / "strict", reflink="always")
    assert not (tmp_path / "strict").exists()


def test_other_failures_are_failures(tmp_path: Path, double: StandIn) -> None:
    source = published(tmp_path / "source")
    for code in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
        double.calls, double.fails = 0, {5: code}
        with pytest.raises(StorageError, match="cannot share blocks with .*" + os.strerror(code)):
            convert(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()
    double.fails = {}
    convert(source, tmp_path / "native")
    verify(tmp_path / "native", against=source)


def test_an_input_that_changes_meanwhile_is_detected(
    tmp_path: Path, double: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = published(tmp_path / "source")
    share = cloning.clone_range
    file = source / "model-00001-of-00003.safetensors"

    def meddling(*arguments: int) -> bool:
        if double.calls == 9:
            os.utime(file, ns=(1, 2))
        return share(*arguments)

    monkeypatch.setattr(cloning, "clone_range", meddling)
    with pytest.raises(InputChangedError):
        convert(source, tmp_path / "native")


@pytest.mark.usefixtures("double")
def test_digests_travel_and_are_made_only_when_asked_for(tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    report = convert(source, tmp_path / "unread")
    assert 0 < report.undigested == plan(source).undigested < report.tensors
    known = digests_of(tmp_path / "unread")
    assert len(known) == report.tensors - report.undigested
    checks = verify(tmp_path / "unread").checks
    assert f"digests: none recorded for {report.undigested:,} tensors" in "\n".join(checks)
    read = convert(source, tmp_path / "read", digests=True)
    assert (read.shared, read.undigested, plan(source, digests=True).undigested) == (report.shared, 0, 0)
    whole = digests_of(tmp_path / "read")
    assert len(whole) == report.tensors
    assert known.items() <= whole.items()
    verify(tmp_path / "read", against=source)
    # What the source records goes with its tensors, unread.
    back = consolidate(tmp_path / "read", tmp_path / "back", max_shard_size=300_000)
    assert back.shared
    assert not back.undigested
    assert digests_of(tmp_path / "back") == whole
    verify(tmp_path / "back")


@pytest.mark.usefixtures("double")
def test_a_partial_manifest_still_finds_damage_to_what_it_records(tmp_path: Path) -> None:
    source = ours(tmp_path / "source", hidden_size=72)
    report = convert(source, tmp_path / "native")
    assert 0 < report.undigested < report.tensors
    name = "model.norm.weight"
    assert name in digests_of(tmp_path / "native")
    chunk = open_checkpoint(tmp_path / "native").store.tensors[name].chunks[0]
    with open(tmp_path / "native" / chunk.file, "r+b") as file:
        file.seek(chunk.position)
        value = file.read(1)
        file.seek(chunk.position)
        file.write(bytes([value[0] ^ 1]))
    with pytest.raises(MismatchError, match=name):
        verify(tmp_path / "native")
    with pytest.raises(MismatchError, match=name):
        consolidate(tmp_path / "native", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.usefixtures("double")
def test_reading_shared_tensors_finds_damage_that_sharing_takes_over(tmp_path: Path) -> None:
    source = ours(tmp_path / "source")
    convert(source, tmp_path / "native", digests=True)
    chunk = open_checkpoint(tmp_path / "native").store.tensors["model.embed_tokens.weight"].chunks[0]
    with open(tmp_path / "native" / chunk.file, "r+b") as file:
        file.seek(chunk.position)
        file.write(bytes(100))
    consolidate(tmp_path / "native", tmp_path / "unread")
    with pytest.raises(MismatchError, match="embed_tokens"):
        verify(tmp_path / "unread")
    with pytest.raises(MismatchError, match="embed_tokens"):
        consolidate(tmp_path / "native", tmp_path / "read", digests=True)
    assert not (tmp_path / "read").exists()


def test_shared_bytes_need_no_free_disk(tmp_path: Path, double: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ours(tmp_path / "source", vocab_size=131072)
    report = plan(source)
    free = 20 << 20
    assert report.nbytes > 2 * free
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free})())
    with pytest.raises(ResourceError, match="free"):
        convert(source, tmp_path / "native", reflink="never")
    side_file = source / "tokenizer.json"
    text = side_file.read_bytes()
    os.truncate(side_file, free)
    with pytest.raises(ResourceError, match="free"):
        convert(source, tmp_path / "native")
    side_file.write_bytes(text)
    # Nor is any taken ahead for files that will share theirs.
    taken: list[int] = []
    monkeypatch.setattr("ckpt_tools.engine.files._allocate", lambda _, size: taken.append(size))
    assert convert(source, tmp_path / "native").shared == report.shared
    assert sum(taken) < free
    # What turns out to be copied after all is checked again.
    double.refusing.update(path.stat().st_ino for path in source.glob("*.safetensors"))
    double.fails, double.calls = {0: 0}, 0
    with pytest.raises(CkptError, match="free"):
        convert(source, tmp_path / "other")


@pytest.mark.usefixtures("double")
def test_elements_narrower_than_a_byte_and_models_of_no_family_are_shared(tmp_path: Path) -> None:
    tensors = {"packed": (DTYPES["F4"], (2, 40961)), "flat": (DTYPES["I64"], (20_000,)), "scalar": (DTYPES["F32"], ())}
    source = write_repository(tmp_path / "source", tensors, {"model_type": "somebody-elses"}, max_shard_size=10**6)
    report = convert(source, tmp_path / "native", file_format="safetensors")
    assert share_of(report) > 0.9
    assert consolidate(tmp_path / "native", tmp_path / "back").shared
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)
    with pytest.raises(UsageError, match="cannot hold F4"):
        convert(source, tmp_path / "dcp")


@pytest.mark.usefixtures("double")
def test_a_plan_leaves_nothing_behind(tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    before = contents(tmp_path)
    assert plan(source, reflink="always").shared > 0
    assert contents(tmp_path) == before


def test_a_chunk_is_split_where_its_source_moves_and_only_for_large_parts() -> None:
    row = BLOCK
    experts = [Span(n * row, (n + 1) * row, 8 if n < 5 else 16) for n in range(9)]
    assert split_rows(experts, row) == [(0, 8), (5, 16)]
    # One row of its own residue stays with its neighbours, also where it is the first.
    assert split_rows([experts[0], Span(row, 2 * row, 24), *experts[2:5]], row) == [(0, 8)]
    assert split_rows([Span(0, row, 24), *experts[1:5]], row) == [(0, 8)]
    # A row that two residues meet in goes with the first.
    halves = [Span(n * row // 2, (n + 1) * row // 2, 8 if n < 9 else 16) for n in range(20)]
    assert split_rows(halves, row) == [(0, 8), (5, 16)]
