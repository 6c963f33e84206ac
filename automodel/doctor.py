"""What training has on this machine, and what would run a model: the half of `ckpt doctor` that needs torch.

Why a kernel does not run is what its own resolver says; this module asks every one of them, and turns the packages that
they looked for in vain into commands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from automodel import fallback
from automodel.attention_backends import resolve_sdpa, resolve_spans
from automodel.auto import empty_model
from automodel.backends import Backend, BackendRow, Resolved, resolve_layers, resolve_loss, resolve_norm
from automodel.expert_backends import resolve_dispatch, resolve_experts, resolve_router
from automodel.kernels.packages import KERNEL_PACKAGES, recorded_misses
from automodel.models.causal_lm import NativeCausalLM
from automodel.models.linear import resolve_linear
from automodel.moe.peers import host_obstacle
from automodel.scan_backends import resolve_delta_rule, resolve_mamba, resolve_short_conv
from ckpt_tools.api.diagnosis import GpuReport, LayerReport, ModelReport, TrainingReport
from ckpt_tools.core.errors import CkptError, UsageError
from ckpt_tools.core.packages import install_command, look_for
from ckpt_tools.engine.checkpoint import Checkpoint, has_weights, open_checkpoint

_HIDDEN, _WIDTH, _HEAD_DIM, _EXPERTS = 2048, 768, 128, 128
_CHANNELS, _TAPS = 6144, 4
_DTYPE = torch.bfloat16
_DEVICES = Path("/dev")
_CUDA_TORCH = "https://pytorch.org/get-started/locally"
_INSTEAD = {"transformer_engine": "flash_attn"}
"""Modules that `auto` would not run once another one, which is missed too, is there."""


def examine_training() -> TrainingReport:
    """What training has here; kernels are looked at in BF16, for shapes that all of them take."""
    device, obstacle = _device()
    layers: list[LayerReport] = []
    with recorded_misses() as misses:
        for layer, resolve in _resolvers(Backend(), device, _DTYPE).items():
            resolved = resolve()
            layers.append(LayerReport(layer, None, resolved.kernel, resolved.reason))
    steps = _install_commands(misses)
    if obstacle and torch.version.cuda is None and any(_DEVICES.glob("nvidia[0-9]*")):
        steps = (f"install torch for CUDA in place of {torch.__version__}: {_CUDA_TORCH}", *steps)
    return TrainingReport(
        _versions(), _gpus(), obstacle, look_for(KERNEL_PACKAGES), device.type, _name(_DTYPE), tuple(layers), steps
    )


def examine_model(source: str) -> ModelReport:
    """What would run the model of a repository, of a native checkpoint, or of a config.json alone.

    The model is built on the meta device; no weights are read.

    Args:
        source: directory.

    Raises:
        CkptError: it cannot be trained.
    """
    device, _ = _device()
    with _errors_of_transformers(source):
        model, reason = empty_model(source, _checkpoint(Path(source)))
    with recorded_misses() as misses:
        if isinstance(model, NativeCausalLM):
            rows = _with_dispatch(model.backend_report(device).rows, device)
        else:
            rows = fallback.backend_report(model, device).rows
    return ModelReport(
        type(model).__name__,
        isinstance(model, NativeCausalLM),
        reason,
        sum(parameter.numel() for parameter in model.parameters()),
        device.type,
        _name(next(model.parameters()).dtype),
        tuple(LayerReport(row.layer, row.count, row.kernel, row.reason) for row in rows),
        _install_commands(misses),
    )


def _resolvers(backend: Backend, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Resolved]]:
    """What decides each kind of layer, by its field of `Backend`; a kind may have a second kernel, in brackets."""

    def experts() -> Resolved:
        return resolve_experts(backend, device, dtype, _HIDDEN, _WIDTH)

    return {
        "experts": experts,
        "dispatch": lambda: resolve_dispatch(backend, experts().kernel, host_obstacle(device)),
        "sdpa": lambda: resolve_sdpa(backend, device, dtype, _HEAD_DIM),
        "sdpa (packed or windowed)": lambda: resolve_spans(backend, device, dtype, _HEAD_DIM),
        "linear": lambda: resolve_linear(backend, device, dtype, None, _HIDDEN, _HIDDEN),
        "mamba": lambda: resolve_mamba(backend, device, dtype, _CHANNELS, _TAPS),
        "linear_attention": lambda: resolve_delta_rule(backend, device, dtype, training=True),
        "linear_attention (convolution)": lambda: resolve_short_conv(backend, device),
        "norm": lambda: resolve_norm(backend, device, dtype),
        "router": lambda: resolve_router(backend, device, _EXPERTS),
        "layers": lambda: resolve_layers(backend, device, training=True),
        "loss": lambda: resolve_loss(backend, device),
    }


def _with_dispatch(rows: Iterable[BackendRow], device: torch.device) -> list[BackendRow]:
    """The rows of a model in one process, and how its experts would be reached on a mesh."""
    found = []
    for row in rows:
        found.append(row)
        if row.layer == "experts":
            dispatch = resolve_dispatch(Backend(), row.kernel, host_obstacle(device))
            found.append(BackendRow("dispatch, where ep > 1", row.count, dispatch.kernel, dispatch.reason))
    return found


def _checkpoint(root: Path) -> Checkpoint | None:
    """The weights, None where there are none or they are damaged, which `examine_checkpoint` tells."""
    with contextlib.suppress(CkptError):
        return open_checkpoint(root) if root.is_dir() and has_weights(root) else None
    return None


@contextlib.contextmanager
def _errors_of_transformers(source: str) -> Iterator[None]:
    """Turns whatever transformers raises at a config that it cannot use into an error of ours."""
    try:
        yield
    except CkptError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise UsageError(
            f"transformers {transformers.__version__} makes no model of {source}: {said}",
            hint="ckpt converts, consolidates and verifies it without a model",
        ) from error


def _device() -> tuple[torch.device, str]:
    """Where training runs, and why not on a GPU."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return torch.device("cpu"), _first_line(error)
    return torch.device("cuda"), ""


def _gpus() -> tuple[GpuReport, ...]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = map(torch.cuda.get_device_properties, range(count))
    return tuple(GpuReport(gpu.name, f"{gpu.major}.{gpu.minor}", gpu.total_memory) for gpu in found)


def _versions() -> dict[str, str]:
    """Of torch and transformers, and of the libraries that torch was built with."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if torch.version.cuda is not None:
        versions["CUDA"] = torch.version.cuda
    if cudnn := _cudnn():
        versions["cuDNN"] = cudnn
    if dist.is_nccl_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _cudnn() -> str:
    """Version of cuDNN, or why it cannot be used; empty where torch was built without."""
    try:
        version = torch.backends.cudnn.version()
    except RuntimeError as error:
        return f"unusable ({_first_line(error)})"
    return f"{version // 10_000}.{version % 10_000 // 100}.{version % 100}" if version else ""


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _install_commands(modules: Iterable[str]) -> tuple[str, ...]:
    """What installs the packages of modules that were missed, each command once."""
    wanted = {module.partition(".")[0] for module in modules}
    wanted -= {slower for slower, faster in _INSTEAD.items() if faster in wanted}
    return tuple(install_command(p) for p in KERNEL_PACKAGES if p.module.partition(".")[0] in wanted)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
