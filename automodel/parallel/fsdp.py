"""`parallelize`: one call that shards a model over a mesh with FSDP2, expert parallelism, or both.

Decoder layers are found by the class names in `_no_split_modules`, which every transformers model has, so a native
model and a plain transformers one are treated alike. Only native experts (modules with a `dispatcher`) are divided
over `ep`; every other parameter is sharded over all processes that are not copies of one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from automodel.parallel.expert import divide_experts, expert_modules, shard_experts
from automodel.parallel.mesh import MixedPrecision, ParallelMesh
from ckpt_tools.core.errors import UsageError

_KEPT_BYTES = 2 << 30
"""Layers that take no more than this together stay gathered from forward to backward."""


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | ParallelMesh | None,
    *,
    mixed_precision: MixedPrecision | None = None,
    reshard_after_forward: bool | None = None,
) -> None:
    """Shard `model` over `mesh`, in place.

    Args:
        model: on the meta device (then `load_parameters` follows), or with values, the same on every process.
        mesh: axes from `dp_replicate`, `dp_shard`, `ep`; None (a single process) leaves the model as it is.
        mixed_precision: dtypes of the computation; None takes those of a `ParallelMesh`.
        reshard_after_forward: free the gathered parameters of a layer between forward and backward. None frees those
            of divided experts, and of layers unless what is left of them is small.

    Raises:
        UsageError: the mesh does not suit the model; the message says which axis.
    """
    if mesh is None:
        return
    parallel = mesh if isinstance(mesh, ParallelMesh) else ParallelMesh.of(mesh)
    precision = mixed_precision or parallel.mixed_precision
    # Inputs are not cast: activations have param_dtype already, and routing weights and rotary tables keep FP32.
    policy = MixedPrecisionPolicy(
        param_dtype=precision.param_dtype, reduce_dtype=precision.reduce_dtype, cast_forward_inputs=False
    )
    layers = decoder_layers(model)
    own_experts: set[nn.Parameter] = set()
    if parallel.size("ep") > 1:
        experts = expert_modules(model)
        if not experts:
            raise UsageError(
                f"{type(model).__name__} has no experts to divide over ep={parallel.size('ep')}",
                hint="use ep=1 and put these processes on dp_shard",
            )
        device = mesh_device(parallel)
        for module in experts.values():
            divide_experts(module, parallel.root["ep"], device)
            if _needs_fsdp(module, parallel, policy):
                shard_experts(module, parallel, policy, reshard_after_forward=reshard_after_forward is not False)
            else:
                own_experts.update(module.parameters())
    if reshard_after_forward is None:
        reshard_after_forward = _gathered_bytes(layers, policy) > _KEPT_BYTES
    for module in model.modules():
        if getattr(module, "keeps_float32", False):
            # A unit of its own: FSDP2 has one dtype a unit, and computes in it.
            exact = MixedPrecisionPolicy(cast_forward_inputs=False)
            fully_shard(module, mesh=parallel.dense, mp_policy=exact, reshard_after_forward=reshard_after_forward)
    for layer in layers:
        fully_shard(
            layer,
            mesh=parallel.dense,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            ignored_params=own_experts,
        )
    fully_shard(model, mesh=parallel.dense, mp_policy=policy, ignored_params=own_experts)
    for layer, following in pairwise(layers):
        # Asked for before the layer runs, so that a host that is late does not keep the next one waiting.
        layer.set_modules_to_forward_prefetch([following])


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model, outermost first.

    Raises:
        UsageError: the class does not say what its blocks are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if type(module).__name__ in names and module not in inside:
            layers.append(module)
            inside.update(module.modules())
    if not layers:
        raise UsageError(
            f"{type(model).__name__} has no decoder layer of the classes {sorted(names)} that _no_split_modules names",
            hint="set _no_split_modules on the class to the class name of its decoder layer",
        )
    return layers


def computation_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which the matrices of `model` multiply: of its parameters, or what FSDP casts those to."""
    own = next(model.parameters()).dtype
    return (_state(model)._mp_policy.param_dtype or own) if isinstance(model, FSDPModule) else own


def side_streams(model: nn.Module) -> list[torch.Stream]:
    """The streams on which FSDP gathers and reduces; none before the first forward pass."""
    if not isinstance(model, FSDPModule):
        return []
    return [held for held in vars(_state(model)._comm_ctx).values() if isinstance(held, torch.Stream)]


def _state(model: FSDPModule) -> Any:
    """What FSDP2 keeps of a module it shards; it has no public name."""
    return model._get_fsdp_state()


def mesh_device(mesh: ParallelMesh) -> torch.device:
    """The device of this process."""
    kind = mesh.root.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _gathered_bytes(layers: Sequence[nn.Module], policy: MixedPrecisionPolicy) -> int:
    """Bytes of the parameters that the layers gather for themselves, without those of divided experts."""
    gathered: Iterable[nn.Parameter] = (p for layer in layers for p in layer.parameters() if not isinstance(p, DTensor))
    return sum(p.numel() * (policy.param_dtype or p.dtype).itemsize for p in gathered)


def _needs_fsdp(experts: nn.Module, mesh: ParallelMesh, policy: MixedPrecisionPolicy) -> bool:
    """Whether anything is to be gathered, reduced or cast; if not, the experts are used where they lie.

    The processes of `expert_data` have the same position on `ep`, so all of them decide alike.
    """
    if all(parameter.to_local().numel() == 0 for parameter in experts.parameters()):
        return False
    if mesh.expert_data.size() > 1:
        return True
    return policy.param_dtype is not None and any(p.dtype != policy.param_dtype for p in experts.parameters())
