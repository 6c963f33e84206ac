"""Sharded safetensors against torch: its reader reads what is planned here, its writer's files are read here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from ckpt_tools.core.errors import FormatError, NotFoundError, UsageError
from ckpt_tools.core.tensors import TargetFiles
from ckpt_tools.formats.sharded_safetensors import INFO, is_sharded, open_sharded, plan_sharded, shard_file
from tests.formats.build import bits, dtype_of, materialize, read_back

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TENSORS = {
    "rows": torch.randn(6, 4).to(torch.bfloat16),
    "columns": torch.randn(3, 7),
    "grid": torch.randn(4, 4),
    "whole": torch.arange(5),
    "scalar": torch.tensor(2.5),
}
CUTS: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "rows": [((0, 0), (2, 4)), ((2, 0), (2, 4)), ((4, 0), (2, 4))],
    "columns": [((0, 0), (3, 3)), ((0, 3), (3, 3)), ((0, 6), (3, 1))],
    "grid": [((0, 0), (4, 2)), ((0, 2), (2, 2)), ((2, 2), (2, 2))],
    "whole": [((0,), (5,))],
    "scalar": [((), ())],
}


def planned(cuts: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = CUTS) -> TargetFiles:
    return plan_sharded(
        {
            name: (
                dtype_of(TENSORS[name]),
                tuple(TENSORS[name].shape),
                [(offsets, sizes, shard_file(i)) for i, (offsets, sizes) in enumerate(boxes, 1)],
            )
            for name, boxes in cuts.items()
        }
    )


def as_torch_writes(root: Path) -> Path:
    """The same shards without the shapes that our files carry."""
    root.mkdir()
    for i in (1, 2, 3):
        pieces = {
            name: (TENSORS[name][tuple(slice(o, o + s) for o, s in zip(*boxes[i - 1], strict=True))], boxes[i - 1][0])
            for name, boxes in CUTS.items()
            if i <= len(boxes)
        }
        info = {name: {"saved_offsets": list(offsets)} for name, (_, offsets) in pieces.items()}
        metadata = {INFO: json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
        save_file({name: piece.contiguous() for name, (piece, _) in pieces.items()}, root / shard_file(i), metadata)
    return root


def test_planned_shards_are_read_by_torch_and_by_us(tmp_path: Path) -> None:
    materialize(planned(), tmp_path, TENSORS)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    store = open_sharded(tmp_path)
    assert store.kind == "sharded-safetensors"
    assert is_sharded(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)
        assert bits(read_back(store, name)) == bits(tensor)
        assert store.tensors[name].shape == tuple(tensor.shape)


def test_planned_shards_are_input_for_torch_consolidation(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    # torch 2.13 writes scalars as 0 and refuses whole numbers.
    cuts = {name: boxes for name, boxes in CUTS.items() if name not in ("scalar", "whole")}
    materialize(planned(cuts), tmp_path / "in", TENSORS)
    (tmp_path / "out").mkdir()
    consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out"), dict.fromkeys(cuts, 1))
    loaded = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    for name in cuts:
        assert torch.equal(loaded[name], TENSORS[name])


def test_shards_written_by_torch_are_read(tmp_path: Path) -> None:
    writer = HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
    dcp.save(TENSORS, storage_writer=writer, no_dist=True)
    store = open_sharded(tmp_path)
    for name, tensor in TENSORS.items():
        assert bits(read_back(store, name)) == bits(tensor)


def test_row_column_and_grid_shards_without_shapes_are_read(tmp_path: Path) -> None:
    store = open_sharded(as_torch_writes(tmp_path / "a"))
    for name, tensor in TENSORS.items():
        assert bits(read_back(store, name)) == bits(tensor)


def test_replicas_are_kept_once(tmp_path: Path) -> None:
    as_torch_writes(tmp_path / "a")
    shutil.copy(tmp_path / "a" / shard_file(2), tmp_path / "a" / shard_file(4))
    store = open_sharded(tmp_path / "a")
    for name, tensor in TENSORS.items():
        assert bits(read_back(store, name)) == bits(tensor)


@pytest.mark.parametrize("numbered", [True, False])
def test_a_missing_middle_shard_is_refused_before_data_is_read(tmp_path: Path, numbered: bool) -> None:
    root = as_torch_writes(tmp_path / "a")
    (root / shard_file(2)).unlink()
    if not numbered:
        for i in (1, 3):
            (root / shard_file(i)).rename(root / f"part{i}.safetensors")
    with pytest.raises(FormatError, match=r"shard-00002-model-|indices 3 to 6 of dimension 1 are in no file"):
        open_sharded(root)


def test_a_missing_last_shard_of_our_own_is_refused(tmp_path: Path) -> None:
    materialize(planned(), tmp_path, TENSORS)
    (tmp_path / shard_file(3)).unlink()
    with pytest.raises(FormatError, match=r"'columns' of shape \[3, 7\] is not whole: indices 6 to 7"):
        open_sharded(tmp_path)


@pytest.mark.parametrize(
    ("info", "fault"),
    [
        ("{}", "does not say where the piece of 'whole' belongs"),
        ('{"whole": {"saved_offsets": [-1]}}', "does not say where"),
        ('{"whole": {"saved_offsets": [0, 0]}}', "does not say where"),
        ('{"whole": {"saved_offsets": [0], "global_shape": "x"}}', "does not say where"),
        ('{"whole": {"saved_offsets": [2]}}', "indices 0 to 2 of dimension 0 are in no file"),
        ('{"whole": {"saved_offsets": [0], "global_shape": [4]}}', "reaches outside"),
        ("[", "not valid JSON"),
    ],
)
def test_damaged_sharding_information_is_refused(tmp_path: Path, info: str, fault: str) -> None:
    save_file({"whole": TENSORS["whole"]}, tmp_path / shard_file(1), {INFO: info})
    with pytest.raises(FormatError, match=fault):
        open_sharded(tmp_path)


def test_files_that_are_not_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_sharded(tmp_path)
    as_torch_writes(tmp_path / "a")
    save_file(TENSORS, tmp_path / "a" / "model.safetensors")
    with pytest.raises(FormatError, match=r"not shards\n  model\.safetensors"):
        open_sharded(tmp_path / "a")


def test_two_chunks_in_one_file_and_holes_are_not_planned() -> None:
    dtype = dtype_of(TENSORS["whole"])
    with pytest.raises(UsageError, match="cannot hold two chunks of 'w'"):
        plan_sharded({"w": (dtype, (4,), [((0,), (2,), "a"), ((2,), (2,), "a")])})
    with pytest.raises(UsageError, match="indices 2 to 4"):
        plan_sharded({"w": (dtype, (4,), [((0,), (2,), "a")])})
