"""DCP checkpoints of torch, of one process and of several, whole and damaged."""

from __future__ import annotations

import pickle
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import FormatError, NotFoundError
from ckpt_tools.formats.dcp import open_dcp, plan_dcp
from tests.formats.build import bits, read_back
from tests.formats.dcp import workers
from tests.formats.dcp.workers import counted

pytestmark = pytest.mark.filterwarnings("ignore")

TENSORS = {
    "model.matrix": counted(5, 7),
    "model.scalar": torch.tensor(-0.0, dtype=torch.bfloat16),
    "model.empty": torch.zeros(0, 4),
    "model.fp8": torch.randn(9).to(torch.float8_e4m3fn),
    "model.u16": torch.arange(5).to(torch.uint16),
    "model.bytes": torch.arange(3, dtype=torch.uint8),
    "model.longs": torch.arange(3),
    "model.flags": torch.tensor([True, False]),
    "model.nan": torch.tensor([float("nan"), float("inf")], dtype=torch.float16),
    "model.transposed": counted(4, 6).t(),
    "model.slice": counted(9, 9)[2:5, 1:8:3],
    "model.complex": torch.randn(2, 2, dtype=torch.complex64),
}


def save(root: Path, state: dict[str, object]) -> Path:
    dcp.save(state, checkpoint_id=root, no_dist=True)
    return root


def edit(root: Path, change: Callable[[Metadata], None]) -> Path:
    path = root / ".metadata"
    document = pickle.loads(path.read_bytes())
    change(document)
    path.write_bytes(pickle.dumps(document))
    return root


def test_every_kind_of_tensor_that_torch_saves_is_read_bit_for_bit(tmp_path: Path) -> None:
    store = open_dcp(save(tmp_path / "a", dict(TENSORS)))
    assert store.kind == "dcp"
    assert store.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert store.tensors[name].shape == tuple(tensor.shape)
        assert bits(read_back(store, name)) == bits(tensor), name
    assert store.files == {"__0_0.distcp": (tmp_path / "a" / "__0_0.distcp").stat().st_size}


def test_optimizer_state_and_objects_are_named_and_left_closed(tmp_path: Path) -> None:
    state = {
        "model": {"w": counted(2, 2)},
        "optimizer": {"state": {"w": {"step": torch.tensor(1.0), "exp_avg": counted(2, 2)}}},
        "state": {"w": {"exp_avg_sq": counted(2, 2)}},
        "progress": {"step": 3},
    }
    root = save(tmp_path / "a", state)
    store = open_dcp(root)
    assert list(store.tensors) == ["model.w"]
    assert store.skipped == {
        "progress.step": "a pickled object; never opened",
        "optimizer.state.w.step": "optimizer state",
        "optimizer.state.w.exp_avg": "optimizer state",
        "state.w.exp_avg_sq": "optimizer state",
    }


class _Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_pickled_objects_beside_the_tensors_are_never_run(tmp_path: Path) -> None:
    root = save(tmp_path / "a", {"w": counted(2, 2), "object": _Runs(tmp_path / "ran")})
    assert open_dcp(root).skipped == {"object": "a pickled object; never opened"}
    assert not (tmp_path / "ran").exists()
    dcp.load({"object": None}, checkpoint_id=root, no_dist=True)
    assert (tmp_path / "ran").exists(), "torch runs it, so the test would notice"


def test_a_file_for_each_of_many_tensors_needs_few_descriptors(tmp_path: Path) -> None:
    writer = dcp.FileSystemWriter(tmp_path, single_file_per_rank=False, sync_files=False)
    state = {f"w{i}": torch.full((2,), float(i)) for i in range(100)}
    dcp.save(state, storage_writer=writer, no_dist=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        store = open_dcp(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(store.files) == 100
    assert all(torch.equal(read_back(store, name), tensor) for name, tensor in state.items())


def test_shards_of_two_processes_are_read(tmp_path: Path) -> None:
    workers.run(workers.save_mesh, 2, tmp_path)
    store = open_dcp(tmp_path / "checkpoint")
    expected = {
        "rows": counted(6, 4).to(torch.bfloat16),
        "uneven": counted(3, 5),
        "tiny": counted(1, 5),
        "columns": counted(4, 6),
        "replica": counted(2, 2),
        "plain": torch.arange(3),
    }
    assert store.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert bits(read_back(store, name)) == bits(tensor), name
    assert {chunk.sizes for chunk in store.tensors["columns"].chunks} == {(4, 3)}
    assert store.skipped.keys() == {"optimizer.state.rows.exp_avg", "progress.step", "progress.text"}


def test_strided_shards_of_four_processes_are_read_right(tmp_path: Path) -> None:
    workers.run(workers.save_strided, 4, tmp_path)
    described = dcp.FileSystemReader(tmp_path / "checkpoint").read_metadata().state_dict_metadata
    packed = {(tuple(c.offsets), tuple(c.sizes)) for c in described["packed_rows"].chunks}
    assert packed == {((0, 0), (4, 3)), ((2, 0), (4, 3)), ((0, 3), (4, 3)), ((2, 3), (4, 3))}, (
        "torch mends it: simplify"
    )
    store = open_dcp(tmp_path / "checkpoint")
    shapes = {"even": (8, 3), "uneven": (6, 3), "packed_rows": (8, 6), "packed_columns": (8, 6)}
    for name, shape in shapes.items():
        assert torch.equal(read_back(store, name), counted(*shape)), name


def test_an_overlap_that_no_strided_shard_explains_is_refused(tmp_path: Path) -> None:
    root = save(tmp_path / "a", {"w": counted(8, 2)})

    def overlap(document: Metadata) -> None:
        chunks = document.state_dict_metadata["w"].chunks
        chunks[:] = [ChunkStorageMetadata(torch.Size([o, 0]), torch.Size([4, 2])) for o in (0, 3)]

    with pytest.raises(FormatError, match=r"'w' of shape \[8, 2\] is not whole: the pieces .* overlap"):
        open_dcp(edit(root, overlap))


def _drop_chunk(document: Metadata, number: int) -> None:
    """Cuts `w` into four described chunks and leaves one out."""
    cuts = [ChunkStorageMetadata(torch.Size([2 * i, 0]), torch.Size([2, 2])) for i in range(4) if i != number]
    document.state_dict_metadata["w"].chunks[:] = cuts


def _forget_place(document: Metadata) -> None:
    del document.storage_data[MetadataIndex("w", [0, 0])]


def _climb(document: Metadata) -> None:
    document.storage_data[MetadataIndex("w", [0, 0])].relative_path = "../a/__0_0.distcp"


def _absolute(document: Metadata) -> None:
    document.storage_data[MetadataIndex("w", [0, 0])].relative_path = "/etc/passwd"


def _beyond(document: Metadata) -> None:
    document.storage_data[MetadataIndex("w", [0, 0])].length += 1


def _compress(document: Metadata) -> None:
    document.storage_data[MetadataIndex("w", [0, 0])].transform_descriptors = ["zstd"]


def _rename_dtype(document: Metadata) -> None:
    document.state_dict_metadata["w"].properties.dtype = torch.int32


def _negative(document: Metadata) -> None:
    document.storage_data[MetadataIndex("w", [0, 0])].offset = -4


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda d: _drop_chunk(d, 1), r"indices 2 to 4 of dimension 0 are in no file"),
        (lambda d: _drop_chunk(d, 3), r"indices 6 to 8 of dimension 0 are in no file"),
        (_forget_place, r"does not say where these chunks are stored\n  w at \[0, 0\] of size \[8, 2\]"),
        (_climb, "not a plain relative path"),
        (_absolute, "not a plain relative path"),
        (_beyond, "described as longer"),
        (_compress, "extension such as compression"),
        (_rename_dtype, r"hold F32 \[8, 2\], described as I32 \[8, 2\] of 'w'"),
        (_negative, "the place of 'w' is not understood"),
    ],
)
def test_a_description_that_does_not_hold_is_refused(
    tmp_path: Path, change: Callable[[Metadata], None], fault: str
) -> None:
    root = edit(save(tmp_path / "a", {"w": counted(8, 2)}), change)
    with pytest.raises(FormatError, match=fault):
        open_dcp(root)


def test_chunks_that_are_said_to_lie_in_each_other_are_refused(tmp_path: Path) -> None:
    root = save(tmp_path / "a", {"one": counted(8, 2), "two": counted(8, 2)})

    def share(document: Metadata) -> None:
        places = document.storage_data
        places[MetadataIndex("two", [0, 0])].offset = places[MetadataIndex("one", [0, 0])].offset

    with pytest.raises(FormatError, match="is said to begin inside"):
        open_dcp(edit(root, share))


def test_missing_files_are_listed_together(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"\.metadata does not exist"):
        open_dcp(tmp_path)
    writer = dcp.FileSystemWriter(tmp_path / "a", single_file_per_rank=False)
    dcp.save({"a": counted(2, 2), "b": counted(2, 2), "c": counted(2, 2)}, storage_writer=writer, no_dist=True)
    (tmp_path / "a" / "__0_0.distcp").unlink()
    (tmp_path / "a" / "__0_2.distcp").write_bytes(b"")
    with pytest.raises(FormatError) as caught:
        open_dcp(tmp_path / "a")
    assert "__0_0.distcp: does not exist" in str(caught.value)
    assert "__0_2.distcp: has 0 bytes and is described as longer" in str(caught.value)


def test_a_description_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    root = save(tmp_path / "a", {"w": counted(2, 2), "o": {"x": 1}})
    whole = (root / ".metadata").read_bytes()
    for length in (*range(0, len(whole), 5), len(whole) - 1):
        (root / ".metadata").write_bytes(whole[:length])
        with pytest.raises(FormatError):
            open_dcp(root)


def test_20_000_chunks_are_opened_in_time_linear_in_their_number(tmp_path: Path) -> None:
    count = 20_000
    target = plan_dcp({f"layer.{i}.w": (DTYPES["F32"], (2, 2), [((0, 0), (2, 2), "a.distcp")]) for i in range(count)})
    with (tmp_path / "a.distcp").open("wb") as file:
        file.truncate(target.store.files["a.distcp"])
        for frame in target.framing:
            file.seek(frame.position)
            file.write(frame.data)
    (tmp_path / ".metadata").write_bytes(target.documents[".metadata"])
    started = time.process_time()
    assert len(open_dcp(tmp_path).tensors) == count
    assert time.process_time() - started < 10
