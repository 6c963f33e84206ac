"""AdamW at the speed of memory, with the factor of gradient clipping folded into the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from automodel.parallel.local import local_part


class FusedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with a step of one Triton kernel for each parameter; for parameters on CUDA.

    Its state is that of torch's (`step` on the host, `exp_avg` and `exp_avg_sq` in the parameter's dtype), so that
    checkpoints of the two are interchangeable. Sharded parameters are updated where they lie.

    Attributes:
        gradient_factor: FP32, one element, on every gradient in the next step; then forgotten. None is 1. With NaN a
            step updates nothing: `take_back` says so to the host, too.
    """

    gradient_factor: torch.Tensor | None = None
    _counted: Sequence[torch.Tensor] = ()
    """`step` of each parameter that the last step updated."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        from automodel.kernels.triton_adamw import adamw_

        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._counted = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                state["step"] += 1
                self._counted.append(state["step"])
                adamw_(
                    local_part(parameter),
                    local_part(parameter.grad).contiguous(),
                    local_part(state["exp_avg"]),
                    local_part(state["exp_avg_sq"]),
                    step=int(state["step"]),
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    factor=self.gradient_factor,
                )
        self.gradient_factor = None
        return loss

    def take_back(self) -> None:
        """After a step with NaN as `gradient_factor`, count as if it had not been."""
        for count in self._counted:
            count.sub_(1)
        self._counted = []


def can_fuse(parameters: list[torch.nn.Parameter]) -> bool:
    """Whether `FusedAdamW` can update these: all on CUDA and contiguous."""
    return all(p.device.type == "cuda" and local_part(p).is_contiguous() for p in parameters)
