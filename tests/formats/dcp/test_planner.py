"""Planned DCP checkpoints, loaded by plain torch: without processes, and into meshes of two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import UsageError
from ckpt_tools.formats.dcp import open_dcp, plan_dcp
from tests.formats.build import bits, dtype_of, materialize, read_back
from tests.formats.dcp import workers
from tests.formats.dcp.workers import counted

pytestmark = pytest.mark.filterwarnings("ignore")

TENSORS = {
    "a.weight": counted(5, 7),
    "b": torch.tensor(3.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "fp8": torch.randn(9).to(torch.float8_e4m3fn),
    "big": torch.randn(64, 64),
}
FILES = ("__0_0.distcp", "__1_0.distcp")


def planned() -> dict[str, tuple[object, ...]]:
    cuts = {name: [((0,) * t.ndim, tuple(t.shape), FILES[0])] for name, t in TENSORS.items()}
    cuts["a.weight"] = [((0, 0), (3, 7), FILES[1]), ((3, 0), (2, 7), FILES[0])]
    cuts["big"] = [((0, 0), (64, 32), FILES[0]), ((0, 32), (64, 32), FILES[0])]
    return {name: (dtype_of(t), tuple(t.shape), cuts[name]) for name, t in TENSORS.items()}


def test_torch_loads_a_planned_checkpoint(tmp_path: Path) -> None:
    target = plan_dcp(planned())  # type: ignore[arg-type]
    materialize(target, tmp_path, TENSORS)
    state = {name: torch.ones_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    store = open_dcp(tmp_path)
    assert store.files == target.store.files
    for name, tensor in TENSORS.items():
        assert bits(state[name]) == bits(tensor)
        assert bits(read_back(store, name)) == bits(tensor)
        stored = [chunk for chunk in target.store.tensors[name].chunks if chunk.numel]
        assert list(store.tensors[name].chunks) == stored
        assert all(chunk.position % 4096 == 0 for chunk in stored)


def test_the_description_is_what_torch_would_write(tmp_path: Path) -> None:
    target = plan_dcp({"w": (DTYPES["BF16"], (4, 2), [((0, 0), (3, 2), "x"), ((3, 0), (1, 2), "y")])})
    (tmp_path / ".metadata").write_bytes(target.documents[".metadata"])
    found = dcp.FileSystemReader(tmp_path).read_metadata()
    sizes = (torch.Size([3, 2]), torch.Size([1, 2]))
    chunks = [ChunkStorageMetadata(torch.Size([3 * i, 0]), size) for i, size in enumerate(sizes)]
    described = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([4, 2]), chunks)
    assert found.state_dict_metadata == {"w": described}
    assert type(found.state_dict_metadata["w"].size) is torch.Size
    assert list(found.storage_data) == [MetadataIndex("w", [0, 0]), MetadataIndex("w", [3, 0])]
    assert [index.index for index in found.storage_data] == [0, 1]
    assert [info.relative_path for info in found.storage_data.values()] == ["x", "y"]
    assert found.version == "1.0.0"


def test_torch_converts_a_planned_checkpoint_to_one_file(tmp_path: Path) -> None:
    materialize(plan_dcp(planned()), tmp_path / "a", TENSORS)  # type: ignore[arg-type]
    dcp_to_torch_save(tmp_path / "a", tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    for name, tensor in TENSORS.items():
        assert bits(loaded[name]) == bits(tensor)


def test_torch_loads_into_meshes_of_two_processes(tmp_path: Path) -> None:
    tensors = {"w": counted(6, 4), "s": torch.tensor(1.5)}
    cuts = [((0, 0), (4, 3), FILES[0]), ((0, 3), (4, 1), FILES[1]), ((4, 0), (2, 4), FILES[1])]
    target = plan_dcp({"w": (DTYPES["F32"], (6, 4), cuts), "s": (DTYPES["F32"], (), [((), (), FILES[0])])})
    materialize(target, tmp_path / "checkpoint", tensors)
    workers.run(workers.load_into_mesh, 2, tmp_path)


def test_framing_is_small_and_the_plan_is_the_same_each_time() -> None:
    one, two = plan_dcp(planned()), plan_dcp(planned())  # type: ignore[arg-type]
    assert one.framing == two.framing
    assert one.documents == two.documents
    assert sum(len(frame.data) for frame in one.framing) < 1500 * (len(TENSORS) + 2)
    assert json.dumps(one.store.files) == json.dumps(two.store.files)


@pytest.mark.parametrize(
    ("chunks", "fault"),
    [
        ([((0,), (2,), "x")], "indices 2 to 4"),
        ([((0,), (3,), "x"), ((2,), (2,), "x")], "overlap"),
        ([((0,), (5,), "x")], "reaches outside"),
        ([], "only 0 of 4 elements"),
    ],
)
def test_chunks_that_do_not_make_up_the_tensor_are_not_planned(chunks: list[tuple[object, ...]], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        plan_dcp({"w": (DTYPES["F32"], (4,), chunks)})  # type: ignore[dict-item]
