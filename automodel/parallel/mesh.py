"""The device mesh of a training job: which axes it may have, how big they are, and the groups derived from them.

Every axis carries different data, so the data-parallel world is the product of all of them:

- `dp_replicate`: parameters are copied, gradients averaged (the outer axis of HSDP);
- `dp_shard`: parameters are sharded by FSDP2;
- `ep`: experts are divided among the processes; dense parameters are sharded by FSDP2 over it as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.names import nearest

AXES = ("dp_replicate", "dp_shard", "ep")
PLANNED_AXES = ("tp", "cp", "pp")
DENSE_AXIS = "dp_shard_ep"


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; `-1` (on one axis at most) takes what the other axes leave of the processes.

    Attributes:
        dp_replicate: copies of the sharded model, for example the number of nodes.
        dp_shard: processes that share one copy of the parameters by FSDP2.
        ep: processes that divide the experts; the number of experts need not be a multiple of it.
        tp, cp, pp: tensor, context and pipeline parallelism, not available yet: 1.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    ep: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1

    def sizes(self, world_size: int) -> dict[str, int]:
        """Size of each axis for `world_size` processes, with `-1` filled in.

        Raises:
            UsageError: the product is not `world_size`, or an axis that is not available is larger than 1.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES + PLANNED_AXES}
        _refuse_planned(sizes)
        if any(size == 0 or size < -1 for size in sizes.values()):
            raise UsageError(f"{self} has an axis of size 0 or less", hint="an axis is 1 or more, or -1 for the rest")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UsageError(f"{self} leaves the axes {' and '.join(free)} open", hint="only one axis may be -1")
        fixed = prod(size for size in sizes.values() if size != -1)
        if free and world_size % fixed == 0:
            sizes[free[0]] = world_size // fixed
        if prod(sizes.values()) != world_size:
            processes = "1 process" if world_size == 1 else f"{world_size} processes"
            raise UsageError(f"{self} does not fit {processes}", hint=_nearest_fit(sizes, world_size))
        return {axis: sizes[axis] for axis in AXES}

    def build(self, device_type: str | None = None) -> DeviceMesh | None:
        """The mesh with the axes `dp_replicate, dp_shard, ep` over all processes.

        Args:
            device_type: `cuda` or `cpu`; None takes the accelerator that the process group communicates on.

        Returns:
            The mesh, or None for a single process without a process group: nothing is to be sharded.

        Raises:
            UsageError: the sizes do not fit the number of processes.
        """
        if not dist.is_initialized():
            sizes = self.sizes(int(os.environ.get("WORLD_SIZE", "1")))
            if prod(sizes.values()) == 1:
                return None
            raise UsageError(
                f"{self} needs a process group",
                hint="call torch.distributed.init_process_group before building the mesh",
            )
        sizes = self.sizes(dist.get_world_size())
        return init_device_mesh(device_type or group_device_type(), tuple(sizes.values()), mesh_dim_names=AXES)


@dataclass(frozen=True)
class MixedPrecision:
    """Dtypes of FSDP2's computation; None keeps the parameters' own.

    Attributes:
        param_dtype: of the parameters during forward and backward, for example BF16 over FP32 parameters.
        reduce_dtype: in which gradients are added up between processes.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class ParallelMesh:
    """A mesh seen by the roles of its axes, whichever of them the user's `DeviceMesh` names.

    Attributes:
        root: the axes `dp_replicate, dp_shard, ep`, in this order, sizes of 1 included.
        dense: what dense parameters are sharded over: (`dp_shard` x `ep`) flattened, after `dp_replicate` if it is > 1.
        expert_data: what a rank's experts are sharded over by FSDP2: `dp_shard`, after `dp_replicate` if it is > 1.
        mixed_precision: dtypes that models sharded over it compute in.
    """

    root: DeviceMesh
    dense: DeviceMesh
    expert_data: DeviceMesh
    mixed_precision: MixedPrecision = MixedPrecision()

    @classmethod
    def of(cls, mesh: DeviceMesh, mixed_precision: MixedPrecision | None = None) -> ParallelMesh:
        """The view of `mesh`; may create process groups, so every process of the mesh calls it.

        Raises:
            UsageError: an axis has no name or an unknown one, or is not available yet.
        """
        root = _canonical(mesh)
        sizes = dict(zip(AXES, root.shape, strict=True))
        if sizes["ep"] == 1:
            shard = root["dp_shard"]
        else:
            # Its own group even where dp_shard is 1: gathers must not queue behind the all-to-all of the experts.
            shard = root["dp_shard", "ep"]._flatten(DENSE_AXIS)
        if sizes["dp_replicate"] == 1:
            dense, expert_data = shard, root["dp_shard"]
        else:
            dense = DeviceMesh._concatenate([root["dp_replicate"], shard])
            expert_data = root["dp_replicate", "dp_shard"]
        return cls(root, dense, expert_data, mixed_precision or MixedPrecision())

    def size(self, axis: str) -> int:
        """Processes along `axis` (one of `AXES`)."""
        return self.root.size(AXES.index(axis))

    @property
    def world_size(self) -> int:
        """Size of the data-parallel world: all processes of the mesh."""
        return self.root.size()

    @property
    def data_rank(self) -> int:
        """Rank of this process in the data-parallel world, row-major over the axes."""
        return data_parallel(self.root)[0]


def data_parallel(mesh: DeviceMesh | None) -> tuple[int, int]:
    """(rank, size) of this process in the data-parallel world; (0, 1) without a mesh."""
    if mesh is None:
        return 0, 1
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UsageError(f"rank {dist.get_rank()} is not part of {mesh}", hint="build the mesh over all processes")
    rank = 0
    for size, position in zip(mesh.shape, coordinate, strict=True):
        rank = rank * size + position
    return rank, mesh.size()


def group_device_type() -> str:
    """`cuda` where the default process group communicates on the GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() and "nccl" in dist.get_backend() else "cpu"


def _canonical(mesh: DeviceMesh) -> DeviceMesh:
    """`mesh` itself when it has exactly `AXES`, else a mesh of the same processes that has."""
    names = mesh.mesh_dim_names
    if names is None:
        raise UsageError(f"{mesh} has no axis names", hint=f"give mesh_dim_names from {', '.join(AXES)}")
    for name in names:
        if name not in AXES + PLANNED_AXES:
            close = nearest(name, AXES)
            raise UsageError(
                f"the mesh has an axis {name!r}, which has no meaning here",
                hint=(f"did you mean {close}? " if close else "") + f"valid axes: {', '.join(AXES)}",
            )
    sizes = dict(zip(names, mesh.shape, strict=True))
    _refuse_planned(sizes)
    if names == AXES:
        return mesh
    # Axes in another order keep their processes: the same ranks, seen along the canonical order.
    order = sorted(range(len(names)), key=lambda i: (AXES + PLANNED_AXES).index(names[i]))
    ranks = mesh.mesh.permute(order).reshape([sizes.get(axis, 1) for axis in AXES])
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=AXES)


def _refuse_planned(sizes: Mapping[str, int]) -> None:
    for axis in PLANNED_AXES:
        if sizes.get(axis, 1) != 1:
            raise UsageError(
                f"the mesh axis {axis} has size {sizes[axis]}, and {axis} parallelism is not available yet",
                hint=f"leave {axis} at 1 and use {', '.join(AXES)}",
            )


def _nearest_fit(sizes: Mapping[str, int], world_size: int) -> str:
    """For each axis, the nearest size that would fit with the other axes as they are."""
    options = []
    for axis in AXES:
        others = prod(abs(size) for name, size in sizes.items() if name != axis)
        if world_size % others:
            continue
        room = world_size // others
        if -1 in sizes.values() and sizes[axis] != -1:
            fits = [size for size in range(1, room + 1) if room % size == 0]
            options.append(f"{axis}={min(fits, key=lambda size: abs(size - sizes[axis]))}")
        elif sizes[axis] != room and sizes[axis] != -1:
            options.append(f"{axis}={room}")
    if options:
        return "with the other axes as they are, " + " or ".join(options) + " fits"
    return f"the product of the axes must be {world_size}"
