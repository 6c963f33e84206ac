"""Experts over GPUs, by each way of dispatch and with each kind of experts, against one GPU in FP32.

Skipped with fewer than two CUDA GPUs. Run on a machine with two or more: `python -m pytest tests/gpu/test_dispatch.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(gpus < 2, reason="needs two CUDA GPUs")

HIDDEN, WIDTH, CHOICES = 512, 256, 4
CASES = {
    "even": {"experts": 32, "tokens": (512, 512), "busy": 32},
    "uneven": {"experts": 9, "tokens": (700, 33), "busy": 9},
    "one has no tokens": {"experts": 16, "tokens": (300, 0), "busy": 16},
    "one is idle": {"experts": 16, "tokens": (64, 200), "busy": 8},
    "one holds no expert": {"experts": 5, "tokens": (64, 48, 20, 31), "busy": 4},
    "biases": {"experts": 12, "tokens": (256, 300), "busy": 12, "bias": True},
}


def on_gpus(work: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(rank, *args)` returns on each of two GPUs (four for a case of four), with NCCL between them."""
    world = args[0] if args and isinstance(args[0], int) else 2
    torch.multiprocessing.spawn(_rank, (world, str(work), function, args), nprocs=world)
    return [torch.load(work / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, work: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.cuda.set_device(rank)
    store = torch.distributed.FileStore(f"{work}/store", world)
    device = torch.device("cuda", rank)
    # As `process_group` has it: what processes agree on travels over gloo, and does not wait for the device.
    backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=device)
    torch.save(function(rank, *args), f"{work}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def inputs(case: dict[str, Any], rank: int, call: int) -> list[torch.Tensor]:
    """Tokens, choices and weights of a process in one call, on the CPU."""
    generator = torch.Generator().manual_seed(100 * call + rank)
    tokens = case["tokens"][rank]
    x = torch.randn(tokens, HIDDEN, generator=generator)
    index = torch.rand(tokens, case["busy"], generator=generator).argsort(-1)[:, :CHOICES]
    return [x, index, torch.rand(tokens, CHOICES, generator=generator)]


WAYS = [
    {"dispatch": "symmetric"},
    {"dispatch": "all_to_all"},
    {"dispatch": "deepep"},
    {"dispatch": "all_to_all", "experts": "sonic"},
    {"dispatch": "deepep", "experts": "sonic"},
]


def require(backend: dict[str, str]) -> None:
    """Skip where what the backend needs is not installed."""
    if backend["dispatch"] == "deepep":
        pytest.importorskip("deep_ep")
    if backend.get("experts") == "sonic":
        pytest.importorskip("quack")


def layer(case: dict[str, Any], backend: str | dict[str, str]) -> Any:
    from automodel.backends import Backend
    from automodel.kernels.activations import SWIGLU, ClampedSwiGLU
    from automodel.moe.experts import Experts

    torch.manual_seed(5)
    bias = case.get("bias", False)
    activation = ClampedSwiGLU(1.702, 7.0) if bias else SWIGLU
    made = Experts(case["experts"], HIDDEN, WIDTH, activation, Backend.parse(backend), bias=bias)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return made


def divided(rank: int, world: int, case: dict[str, Any], backend: dict[str, str], calls: int) -> list[torch.Tensor]:
    """Outputs and gradients of this process after several calls of one layer, forward all and then backward all."""
    from torch.distributed.device_mesh import init_device_mesh

    from automodel.parallel.expert import divide_experts

    mesh = init_device_mesh("cuda", (world,), mesh_dim_names=("ep",))
    experts = layer(case, backend).bfloat16()
    divide_experts(experts, mesh, torch.device("cuda", rank))
    assert experts.resolve_dispatch("fused").kernel == backend["dispatch"], experts.peers
    results, losses, leaves = [], [], []
    for call in range(calls):
        x, index, weight = (tensor.cuda() for tensor in inputs(case, rank, call))
        x, weight = x.bfloat16().requires_grad_(), weight.requires_grad_()
        out = experts(x, index, weight)
        results.append(out)
        losses.append(out.float().square().sum())
        leaves += [x, weight]
    sum(losses).backward()
    results += [leaf.grad for leaf in leaves] + [p.grad.to_local() for p in experts.parameters()]
    return [result.detach().float().cpu() for result in results]


def whole(case: dict[str, Any], calls: int) -> list[torch.Tensor]:
    """The same on one GPU in FP32, for the tokens of all processes."""
    experts = layer(case, "torch").bfloat16().float().cuda()
    results, losses, leaves = [], [], []
    for call in range(calls):
        parts = [inputs(case, rank, call) for rank in range(len(case["tokens"]))]
        x, index, weight = (torch.cat(part).cuda() for part in zip(*parts, strict=True))
        x, weight = x.bfloat16().float().requires_grad_(), weight.requires_grad_()
        out = experts(x, index, weight)
        results.append(out)
        losses.append(out.square().sum())
        leaves += [x, weight]
    sum(losses).backward()
    return [t.detach().cpu() for t in (*results, *(leaf.grad for leaf in [*leaves, *experts.parameters()]))]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("backend", WAYS, ids=lambda backend: ", ".join(backend.values()))
def test_values_and_gradients_are_those_of_one_gpu(
    tmp_path: Path, case: dict[str, Any], backend: dict[str, str]
) -> None:
    require(backend)
    if case.get("bias") and backend.get("experts") == "sonic":
        pytest.skip("the SonicMoE kernels are called without biases")
    world, calls = len(case["tokens"]), 3
    if world > gpus:
        pytest.skip(f"needs {world} GPUs")
    ranks = on_gpus(tmp_path, divided, world, case, backend, calls)
    for number, (exact, *parts) in enumerate(zip(whole(case, calls), *ranks, strict=True)):
        actual = torch.cat(parts) * (world if number >= 3 * calls else 1)
        error = (actual - exact).norm() / exact.norm()
        assert error < 0.02, f"result {number}: {error:.4f}"


def many_calls(rank: int, world: int, case: dict[str, Any], backend: dict[str, str]) -> list[float]:
    """How far 200 passes of two layers in a row, with other tokens in turn, are from the first pass of each."""
    from torch.distributed.device_mesh import init_device_mesh

    from automodel.parallel.expert import divide_experts

    mesh = init_device_mesh("cuda", (world,), mesh_dim_names=("ep",))
    layers = [layer(case, backend).bfloat16() for _ in range(2)]
    for experts in layers:
        divide_experts(experts, mesh, torch.device("cuda", rank))
    batches = [[tensor.cuda() for tensor in inputs(case, rank, call)] for call in range(3)]
    first: dict[int, list[torch.Tensor]] = {}
    differing = []
    for turn in range(200):
        x, index, weight = batches[turn % 3]
        # One process is late now and then: what it has not read yet must still be there.
        if turn % 7 == rank:
            torch.cuda._sleep(20_000_000)
        x = x.bfloat16().requires_grad_()
        weight = weight.detach().requires_grad_()
        out = layers[1](layers[0](x, index, weight), index, weight)
        grads = torch.autograd.grad(out.float().square().sum(), [x, weight])
        results = [out.detach(), *grads]
        differing.append(sum((a != b).sum() for a, b in zip(results, first.setdefault(turn % 3, results), strict=True)))
    return torch.stack([torch.as_tensor(count, device="cuda") for count in differing]).tolist()


@pytest.mark.parametrize("backend", [WAYS[0], *WAYS[2:]], ids=lambda backend: ", ".join(backend.values()))
def test_two_hundred_passes_are_the_same_to_the_bit_however_late_a_process_is(
    tmp_path: Path, backend: dict[str, str]
) -> None:
    require(backend)
    for counts in on_gpus(tmp_path, many_calls, 2, {"experts": 32, "tokens": (1024, 900), "busy": 32}, backend):
        assert counts == [0] * 200
