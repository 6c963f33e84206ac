"""Jobs of several gloo processes that save and load DCP checkpoints with torch, for the tests to judge by."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

_PRELOAD = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel")


def run(job: Callable[[Path], None], world: int, folder: Path) -> None:
    """Runs `job(folder)` in `world` processes with a process group."""
    # One server imports torch and forks each process: a spawned one would take seconds to start.
    multiprocessing.set_forkserver_preload([*_PRELOAD])
    mp.start_processes(_enter, args=(job, world, folder), nprocs=world, start_method="forkserver")


def _enter(rank: int, job: Callable[[Path], None], world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(str(folder / "rendezvous"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    job(folder)
    dist.barrier()
    dist.destroy_process_group()


def counted(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)


class _Unvalidated(DefaultSavePlanner):
    """Saves what the default planner of torch 2.13 refuses; planners of training frameworks do the same."""

    def create_global_plan(self, all_plans):  # type: ignore[no-untyped-def]
        import torch.distributed.checkpoint.default_planner as planner

        planner._validate_global_plan = lambda *_: []
        return super().create_global_plan(all_plans)


def save_strided(folder: Path) -> None:
    """FSDP2 over tensor parallelism on one dimension, evenly and unevenly; and `_StridedShard` placements alone."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    layers = torch.nn.ModuleList(torch.nn.Linear(3, rows, bias=False) for rows in (8, 6))
    for layer in layers:
        with torch.no_grad():
            layer.weight.copy_(counted(*layer.weight.shape))
        parallelize_module(layer, mesh["tp"], ColwiseParallel())
        fully_shard(layer, mesh=mesh["fsdp"])
    assert any(isinstance(p, _StridedShard) for p in layers[0].weight.placements)
    state: dict[str, object] = {"even": layers[0].weight, "uneven": layers[1].weight}
    whole = counted(8, 6)
    rank = mesh["fsdp"].get_local_rank()
    for name, dim in (("packed_rows", 0), ("packed_columns", 1)):
        quarter = whole.shape[dim] // 4 if dim == 0 else 1
        order = torch.arange(whole.shape[dim] // quarter)[rank::2] * quarter
        index = torch.cat([torch.arange(start, start + quarter) for start in order.tolist()])
        local = whole.index_select(dim, index)
        split = len(order)
        other = Shard(1 - dim) if name == "packed_rows" else Replicate()
        if isinstance(other, Shard):
            local = local.chunk(2, dim=1 - dim)[mesh["tp"].get_local_rank()].contiguous()
        placements = [_StridedShard(dim, split_factor=split), other]
        tensor = DTensor.from_local(local, mesh, placements, shape=whole.shape, stride=whole.stride())
        assert torch.equal(tensor.full_tensor(), whole)
        state[name] = tensor
    dcp.save(state, checkpoint_id=folder / "checkpoint", planner=_Unvalidated())


def save_mesh(folder: Path) -> None:
    """Row shards, replicas, an uneven split and optimizer state, by FSDP2-like placements on two processes."""
    mesh = init_device_mesh("cpu", (2,))
    state = {
        "rows": distribute_tensor(counted(6, 4).to(torch.bfloat16), mesh, [Shard(0)]),
        "uneven": distribute_tensor(counted(3, 5), mesh, [Shard(0)]),
        "tiny": distribute_tensor(counted(1, 5), mesh, [Shard(0)]),
        "columns": distribute_tensor(counted(4, 6), mesh, [Shard(1)]),
        "replica": distribute_tensor(counted(2, 2), mesh, [Replicate()]),
        "plain": torch.arange(3),
        "optimizer": {"state": {"rows": {"exp_avg": distribute_tensor(counted(6, 4), mesh, [Shard(0)])}}},
        "progress": {"step": 7, "text": "ü"},
    }
    dcp.save(state, checkpoint_id=folder / "checkpoint")


def load_into_mesh(folder: Path) -> None:
    """Loads `w` (6 x 4) by columns and by rows on two processes and compares."""
    mesh = init_device_mesh("cpu", (2,))
    for placement in (Shard(0), Shard(1), Replicate()):
        state = {"w": distribute_tensor(torch.zeros(6, 4), mesh, [placement]), "s": torch.zeros(())}
        dcp.load(state, checkpoint_id=folder / "checkpoint")
        assert torch.equal(state["w"].full_tensor(), counted(6, 4)), placement
        assert state["s"].item() == 1.5
