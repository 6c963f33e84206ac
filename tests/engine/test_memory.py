"""Boxes of native tensors loaded from and saved to repositories, as the ranks of a mesh hold them."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools import convert, verify
from ckpt_tools.core.dtypes import DTYPES, DType
from ckpt_tools.core.errors import LayoutError, OutputExistsError
from ckpt_tools.engine.checkpoint import Checkpoint, open_checkpoint
from ckpt_tools.engine.files import FileReader
from ckpt_tools.engine.memory import Box, RepositoryExport, load_boxes, model_layout
from ckpt_tools.engine.sharding import ShardingMesh, boxes
from ckpt_tools.families import FAMILIES
from tests.checkpoints import make_repository, tensor_bytes, write_repository

BF16 = DTYPES["BF16"]


def rank_boxes(checkpoint: Checkpoint, mesh: ShardingMesh, rank: int, dtype: DType = BF16) -> list[Box]:
    """Empty boxes of everything that a rank of the mesh holds."""
    layout = checkpoint.layout
    return [
        Box(name, offsets, sizes, dtype, memoryview(bytearray(b"\xaa" * (prod(sizes) * dtype.itemsize))))
        for name, tensor in layout.native.items()
        for owner, offsets, sizes in boxes(tensor.shape, mesh, stacked=name in layout.stacked)
        if owner == rank
    ]


@settings(max_examples=15, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    dp_shard=st.integers(1, 3),
    ep=st.integers(1, 3),
    native=st.sampled_from([None, "", "dp_shard=2,ep=3"]),
)
def test_what_the_ranks_of_any_mesh_load_they_save_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, family: str, dp_shard: int, ep: int, native: str | None
) -> None:
    root = tmp_path_factory.mktemp("case")
    source = make_repository(root / "source", family)
    if native is not None:
        convert(source, root / "native", mesh=native or None)
    checkpoint = open_checkpoint(source if native is None else root / "native")
    mesh = ShardingMesh(dp_shard, ep)
    config = json.loads((source / "config.json").read_bytes())

    def export() -> RepositoryExport:
        dtypes = dict.fromkeys(checkpoint.layout.native, BF16)
        return RepositoryExport(
            checkpoint.layout, config, root / "out", dtypes=dtypes, max_shard_size=20_000, side_files_from=source
        )

    first = export()
    first.prepare()
    for rank in range(mesh.ranks):
        held = rank_boxes(checkpoint, mesh, rank)
        load_boxes(checkpoint, held)
        (first if rank == 0 else export()).write(held)
    assert not (root / "out").exists()
    first.commit()
    assert tensor_bytes(root / "out") == tensor_bytes(source)
    assert (root / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    verify(root / "out", against=source)


def test_a_rank_reads_hardly_more_than_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(make_repository(tmp_path / "source", num_experts=8, moe_intermediate_size=64))
    read, wanted = [0], [0]
    original = FileReader.read

    def counting(self: FileReader, file: str, position: int, into: memoryview) -> None:
        read[0] += len(into)
        original(self, file, position, into)

    monkeypatch.setattr(FileReader, "read", counting)
    held = rank_boxes(checkpoint, ShardingMesh(2, 4), 5)
    load_boxes(checkpoint, held)
    wanted[0] = sum(len(box.data) for box in held)
    assert read[0] == wanted[0]


def test_boxes_of_another_dtype_are_cast(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    source = make_repository(tmp_path / "source", "qwen3")
    checkpoint = open_checkpoint(source)
    data = bytearray(32 * 4)
    load_boxes(checkpoint, [Box("model.norm.weight", (0,), (32,), DTYPES["F32"], memoryview(data))])
    stored = np.frombuffer(tensor_bytes(source)["model.norm.weight"], ml_dtypes.bfloat16)
    assert np.array_equal(np.frombuffer(data, np.float32), stored.astype(np.float32), equal_nan=True)


def test_names_that_the_model_and_the_checkpoint_do_not_share_are_listed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_repository(tmp_path / "source", "qwen3"))
    names = set(checkpoint.layout.native) - {"model.norm.weight"} | {"model.extra"}
    with pytest.raises(LayoutError) as caught:
        model_layout(checkpoint, names)
    assert "model.extra" in str(caught.value)
    assert "model.norm.weight" in str(caught.value)
    assert model_layout(checkpoint, checkpoint.layout.native.keys()) is not None


@pytest.mark.parametrize(
    ("name", "offsets", "sizes", "size"),
    [
        ("model.nrom.weight", (0,), (4,), 8),
        ("model.norm.weight", (30,), (4,), 8),
        ("model.norm.weight", (0, 0), (4, 1), 8),
        ("model.norm.weight", (0,), (4,), 6),
    ],
)
def test_a_box_that_does_not_fit_its_tensor_is_refused(
    tmp_path: Path, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], size: int
) -> None:
    checkpoint = open_checkpoint(make_repository(tmp_path / "source", "qwen3"))
    with pytest.raises(LayoutError):
        load_boxes(checkpoint, [Box(name, offsets, sizes, BF16, memoryview(bytearray(size)))])


def test_an_aborted_export_leaves_nothing_and_an_existing_output_is_refused(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3")
    checkpoint = open_checkpoint(source)
    dtypes = dict.fromkeys(checkpoint.layout.native, BF16)
    export = RepositoryExport(checkpoint.layout, {}, tmp_path / "out", dtypes=dtypes, max_shard_size=10**9)
    export.prepare()
    export.abort()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    with pytest.raises(OutputExistsError):
        RepositoryExport(checkpoint.layout, {}, source, dtypes=dtypes, max_shard_size=10**9)


def test_a_part_of_a_tensor_of_an_unknown_architecture_is_read_from_its_place(tmp_path: Path) -> None:
    source = write_repository(tmp_path / "source", {"w": (BF16, (6, 4))}, {"model_type": "somebody-elses"})
    data = bytearray(2 * 4 * 2)
    load_boxes(open_checkpoint(source), [Box("w", (3, 0), (2, 4), BF16, memoryview(data))])
    assert bytes(data) == tensor_bytes(source)["w"][3 * 8 : 5 * 8]


def test_files_of_an_interrupted_export_that_was_cut_otherwise_do_not_stay(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3")
    checkpoint = open_checkpoint(source)
    held = rank_boxes(checkpoint, ShardingMesh(), 0)
    load_boxes(checkpoint, held)
    dtypes = dict.fromkeys(checkpoint.layout.native, BF16)
    for size in (10_000, 10**9):
        export = RepositoryExport(checkpoint.layout, {}, tmp_path / "out", dtypes=dtypes, max_shard_size=size)
        export.prepare()
        export.write(held)
        if size == 10_000:
            export._staging.__exit__()  # as if the process had died here
    export.commit()
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_rank_with_a_slice_of_transposed_experts_reads_them_in_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # GPT-OSS in BF16 holds experts as [in, out] with gate and up alternating: a rank's rows are single elements there.
    source = make_repository(tmp_path / "source", "gpt_oss", hidden_size=96, intermediate_size=128)
    checkpoint = open_checkpoint(source)
    mesh = ShardingMesh(dp_shard=2, ep=2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    reads: list[int] = []
    read = FileReader.read
    monkeypatch.setattr(FileReader, "read", lambda self, *a: reads.append(len(a[2])) or read(self, *a))
    whole = [box for box in rank_boxes(checkpoint, ShardingMesh(), 0) if box.name == name]
    load_boxes(checkpoint, whole)
    wanted = np.frombuffer(whole[0].data, np.uint16).reshape(whole[0].sizes)
    reads.clear()
    for rank in range(mesh.ranks):
        (box,) = (box for box in rank_boxes(checkpoint, mesh, rank) if box.name == name)
        load_boxes(checkpoint, [box], threads=1)
        part = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
        assert np.array_equal(np.frombuffer(box.data, np.uint16).reshape(box.sizes), wanted[part])
    assert len(reads) <= 4 * mesh.ranks
