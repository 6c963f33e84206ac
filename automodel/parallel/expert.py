"""Dividing the experts of a model over the `ep` axis, and their share over `dp_shard`.

After this, an expert parameter [E, ...] is a `DTensor` with `Shard(0)` over `ep` and `Shard(1)` over `dp_shard`. The
dimensions differ, so each process holds one plain box of it, which checkpoint files can be read into and written from.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from automodel.moe.deepep import DeepEPDispatcher, open_buffer
from automodel.moe.dispatch import AllToAllDispatcher
from automodel.moe.peers import open_peers
from automodel.parallel.mesh import ParallelMesh
from ckpt_tools.core.errors import UsageError


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that hold stacked experts and can work with a dispatcher, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "dispatcher")}


def divide_experts(experts: nn.Module, ep_mesh: DeviceMesh, device: torch.device) -> None:
    """Make the parameters of `experts` DTensors with `Shard(0)` over `ep_mesh`, and give it a dispatcher and peers.

    Chunks are ceil(E / size), so the number of experts need not be a multiple; the last processes may hold none.
    Parameters on the meta device stay there; others are moved to `device`.

    Raises:
        UsageError: the backend asks for `deepep`, which cannot run here.
    """
    num_experts = 0
    for name, parameter in list(experts.named_parameters(recurse=False)):
        num_experts = parameter.shape[0]
        chunk = -(-num_experts // ep_mesh.size())
        start = min(ep_mesh.get_local_rank() * chunk, num_experts)
        local = parameter.detach()[start : start + chunk]
        local = local.clone() if local.is_meta else local.to(device, copy=True)
        whole = DTensor.from_local(
            local, ep_mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
        setattr(experts, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    group = ep_mesh.get_group()
    if experts.backend.dispatch == "deepep":
        experts.dispatcher = DeepEPDispatcher(
            open_buffer(group, device, experts.down_proj.shape[1]), group, num_experts
        )
        return
    experts.dispatcher = AllToAllDispatcher(group, num_experts)
    if experts.backend.dispatch != "all_to_all":
        experts.peers = open_peers(group, device)


def shard_experts(
    experts: nn.Module, mesh: ParallelMesh, policy: MixedPrecisionPolicy, *, reshard_after_forward: bool
) -> None:
    """Shard the experts of this process over `dp_shard` (and replicate over `dp_replicate`) with FSDP2.

    Raises:
        UsageError: the second dimension of a parameter is not a multiple of `dp_shard`.
    """
    shards = mesh.size("dp_shard")
    for name, parameter in experts.named_parameters(recurse=False):
        if parameter.shape[1] % shards:
            raise UsageError(
                f"{type(experts).__name__}.{name} {tuple(parameter.shape)} cannot be divided over dp_shard={shards}: "
                f"{parameter.shape[1]} is not a multiple of it",
                hint=f"choose a dp_shard that divides {parameter.shape[1]}; other processes can go on dp_replicate",
            )
    fully_shard(
        experts,
        mesh=mesh.expert_data,
        mp_policy=policy,
        reshard_after_forward=reshard_after_forward,
        shard_placement_fn=lambda _: Shard(1),
    )
