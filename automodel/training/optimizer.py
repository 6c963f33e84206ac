"""AdamW over a sharded model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from automodel.kernels.packages import is_installed
from automodel.training.fused_adamw import FusedAdamW, can_fuse


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101).

    Attributes:
        lr: peak learning rate.
        betas: decay of the running mean of gradients and of their squares.
        eps: added to the root of the mean square.
        weight_decay: on matrices only; norms, biases and other 1-d parameters have none.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that require gradients, after it was sharded.

    Parameters on different meshes (experts and the rest) are in different groups, because one fused update works on
    tensors of one mesh.
    """
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((mesh, parameter.ndim >= 2), []).append(parameter)
    fused = is_installed("triton") and can_fuse(
        [parameter for parameters in groups.values() for parameter in parameters]
    )
    made = FusedAdamW if fused else partial(torch.optim.AdamW, foreach=True)
    return made(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
            for (_, decays), parameters in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )
