"""The one-kernel AdamW against torch's: the same updates, state and checkpoints.

On a machine without a GPU Triton's interpreter runs the kernel, where Triton is installed.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("triton")

from automodel.training.fused_adamw import FusedAdamW, can_fuse

on_gpu = torch.cuda.is_available()
DEVICE = "cuda" if on_gpu else "cpu"
# The interpreter cuts BF16 where GPUs round.
HALF = torch.bfloat16 if on_gpu else torch.float16
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    shapes = [(3, 5), (5000,), (), (0, 4)]
    return [torch.nn.Parameter(torch.randn(shape, device=DEVICE).to(dtype)) for shape in shapes]


def give_gradients(held: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    torch.manual_seed(seed)
    for parameter in held:
        parameter.grad = torch.randn_like(parameter, dtype=torch.float32).mul(scale).to(parameter.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (HALF, 1e-2)])
def test_updates_and_state_are_those_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    mine, theirs = parameters(dtype), parameters(dtype)
    ours, torchs = FusedAdamW(mine, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step in range(4):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        ours.step()
        torchs.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        for key, value in torchs.state[b].items():
            torch.testing.assert_close(ours.state[a][key].cpu(), value.cpu(), rtol=tolerance, atol=tolerance)


def test_a_state_of_torch_is_taken_up() -> None:
    mine, theirs = parameters(torch.float32), parameters(torch.float32)
    torchs = torch.optim.AdamW(theirs, **OPTIONS)
    give_gradients(theirs, 0)
    torchs.step()
    ours = FusedAdamW(mine, **OPTIONS)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for a, b in zip(mine, theirs, strict=True):
        a.data.copy_(b.data)
    give_gradients(mine, 1)
    give_gradients(theirs, 1)
    ours.step()
    torchs.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_factor_scales_gradients_once() -> None:
    mine, theirs = parameters(torch.float32), parameters(torch.float32)
    ours, torchs = FusedAdamW(mine, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, fused=True)
    for step, factor in enumerate((0.25, 1.0)):
        give_gradients(mine, step)
        give_gradients(theirs, step, scale=factor)
        if factor != 1:
            ours.gradient_factor = torch.tensor(factor, device=DEVICE)
        ours.step()
        torchs.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_factor_that_is_no_number_updates_nothing() -> None:
    mine = parameters(torch.float32)
    ours = FusedAdamW(mine, **OPTIONS)
    for seed, factor in enumerate((1.0, math.nan)):
        held = copy.deepcopy([p.detach() for p in mine]), copy.deepcopy(ours.state_dict())
        give_gradients(mine, seed)
        ours.gradient_factor = torch.tensor(factor, device=DEVICE)
        ours.step()
    ours.take_back()
    assert all(torch.equal(p, before) for p, before in zip(mine, held[0], strict=True))
    for number, state in held[1]["state"].items():
        assert all(torch.equal(value, ours.state_dict()["state"][number][key]) for key, value in state.items())


def test_parameters_without_gradient_stay() -> None:
    mine = parameters(torch.float32)
    before = mine[0].clone()
    FusedAdamW(mine, **OPTIONS).step()
    assert torch.equal(mine[0], before)


def test_only_contiguous_parameters_on_cuda_can_be_fused() -> None:
    assert not can_fuse([torch.nn.Parameter(torch.zeros(2, 2))])
