"""A mesh is checked before anything is sharded over it, and any user's DeviceMesh is understood by its axis names."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from automodel.parallel.mesh import MeshConfig, ParallelMesh, data_parallel
from ckpt_tools.core.errors import UsageError
from tests.automodel.ranks import run_ranks


def test_the_open_axis_takes_what_the_others_leave():
    assert MeshConfig(ep=2).sizes(8) == {"dp_replicate": 1, "dp_shard": 4, "ep": 2}
    assert MeshConfig(dp_replicate=2, dp_shard=2, ep=-1).sizes(8) == {"dp_replicate": 2, "dp_shard": 2, "ep": 2}


@pytest.mark.parametrize(
    ("config", "world_size", "hint"),
    [
        (MeshConfig(ep=3), 8, "ep=2 fits"),
        (MeshConfig(ep=6), 8, "ep=4 or|ep=4 fits|ep=8 fits"),
        (MeshConfig(dp_shard=2, ep=2), 8, "dp_replicate=2 or dp_shard=4 or ep=4 fits"),
        (MeshConfig(dp_shard=3, ep=3), 8, "product of the axes must be 8"),
    ],
)
def test_sizes_that_do_not_fit_name_the_nearest_that_do(config, world_size, hint):
    with pytest.raises(UsageError, match="does not fit 8 processes") as caught:
        config.sizes(world_size)
    assert any(part in caught.value.hint for part in hint.split("|")), caught.value.hint


def test_axes_that_are_not_available_are_refused_by_name():
    with pytest.raises(UsageError, match="tp parallelism is not available yet"):
        MeshConfig(tp=2).sizes(2)


@pytest.mark.parametrize("config", [MeshConfig(ep=0), MeshConfig(ep=-2), MeshConfig(dp_shard=-1, ep=-1)])
def test_sizes_without_meaning_are_refused(config):
    with pytest.raises(UsageError):
        config.sizes(4)


def test_one_process_without_a_group_has_no_mesh():
    assert MeshConfig().build() is None
    assert data_parallel(None) == (0, 1)


def test_several_processes_need_a_group_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="needs a process group"):
        MeshConfig().build()


def test_missing_axes_have_size_one_and_any_order_is_accepted():
    def view():
        only_ep = ParallelMesh.of(init_device_mesh("cpu", (4,), mesh_dim_names=("ep",)))
        swapped = ParallelMesh.of(init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "dp_shard")))
        return (
            [only_ep.size(axis) for axis in ("dp_replicate", "dp_shard", "ep")],
            only_ep.dense.size(),
            (swapped.size("dp_shard"), swapped.size("ep"), swapped.root["ep"].mesh.tolist()),
            swapped.data_rank,
        )

    ranks = run_ranks(4, view)
    assert all(r[0] == [1, 1, 4] and r[1] == 4 for r in ranks)
    # In the user's mesh ranks 0 and 2 are neighbours along ep, and they stay so.
    assert [r[2] for r in ranks] == [(2, 2, [0, 2]), (2, 2, [1, 3]), (2, 2, [0, 2]), (2, 2, [1, 3])]
    assert sorted(r[3] for r in ranks) == [0, 1, 2, 3]


def test_unknown_axes_are_refused_with_the_nearest_name():
    def refused():
        with pytest.raises(UsageError, match="an axis 'dp_shards'") as caught:
            ParallelMesh.of(init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shards",)))
        assert "did you mean dp_shard?" in caught.value.hint
        with pytest.raises(UsageError, match="tp parallelism"):
            ParallelMesh.of(init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "tp")))
        with pytest.raises(UsageError, match="no axis names"):
            ParallelMesh.of(DeviceMesh("cpu", torch.arange(2)))

    run_ranks(2, refused)


def test_each_process_has_its_own_data_rank():
    def rank():
        return dist.get_rank(), data_parallel(MeshConfig(dp_replicate=2, ep=2).build())

    assert run_ranks(4, rank) == [(r, (r, 4)) for r in range(4)]
