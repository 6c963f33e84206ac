"""Which implementation runs each kind of layer, and why not a faster one.

A `Backend` is what the user asked for, one field per kind of layer. The `resolve_*` functions turn it into the
kernel that runs on a device and dtype, with the reason; layers and `BackendReport` use the same functions, so that
the report is what happens. Those of attention, experts and scans are in modules of their own. A kernel that was
asked for by name and cannot run is an error, never a fallback; only `sdpa` is a preference, behind which torch's
own order follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, NoReturn, TypeVar, get_args

import torch

from automodel.kernels.cross_entropy import fused_loss_obstacle
from automodel.kernels.packages import is_installed
from automodel.kernels.te import LinearKernel, te_obstacle
from automodel.logging import get_logger, log_once
from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.names import nearest

_logger = get_logger(__name__)

ExpertsChoice = Literal["auto", "torch", "grouped_mm", "fused", "sonic", "te"]
NormChoice = Literal["auto", "torch", "fused", "te"]
RouterChoice = Literal["auto", "torch", "fused"]
MambaChoice = Literal["auto", "torch", "fused"]
DispatchChoice = Literal["auto", "all_to_all", "symmetric", "deepep"]
LinearAttentionChoice = Literal["auto", "torch", "fla"]
NormKernel = Literal["torch", "fused", "te"]
DispatchKernel = Literal["all_to_all", "symmetric", "deepep"]
SdpaChoice = Literal["auto", "torch", "cudnn", "flash4", "te"]
LinearChoice = Literal["auto", LinearKernel]
LayersChoice = Literal["auto", "eager", "compiled"]
LossChoice = Literal["auto", "torch", "fused"]
AttentionKernel = Literal["sdpa", "eager"]
ATTENTION_KERNELS: tuple[str, ...] = get_args(AttentionKernel)
Kernel = TypeVar("Kernel", bound=str)


@dataclass(frozen=True, slots=True)
class Backend:
    """The implementation wanted for each kind of layer; `"auto"` takes the fastest that can run.

    Attributes:
        experts: `"torch"` loops over experts, `"grouped_mm"` multiplies all of them in one call, `"fused"` also has
            Triton kernels around the products, which are QuACK's where that is installed, `"sonic"` is SonicMoE's
            products, which do all of that work themselves, `"te"` runs TransformerEngine's products, an expert at a
            time.
        dispatch: how tokens reach experts on other processes: `"all_to_all"` through collectives between which the
            host waits for the device, `"symmetric"` through memory that GPUs of one host read from each other,
            `"deepep"` through DeepEP, which was measured to take longer.
        router: `"torch"` is softmax or sigmoid, and topk, `"fused"` both as one kernel.
        mamba: `"torch"` is the reference, `"fused"` the kernels of mamba_ssm and causal_conv1d.
        norm: `"torch"` rounds as transformers does, `"fused"` is `torch.nn.functional.rms_norm`, and for norms of
            heads one kernel with their rotation; `"te"` TransformerEngine's.
        linear: `"torch"`, or TransformerEngine's products: `"te"` in the dtype of the model; `"fp8"` and `"fp8_block"`
            in FP8 where that was measured to be faster, see `kernels.te_linear`.
        linear_attention: `"torch"` computes the gated delta rule and its convolution by chunks in torch, `"fla"` by
            flash-linear-attention, and causal-conv1d where that is installed.
        sdpa: `"torch"` leaves the choice of a kernel to `scaled_dot_product_attention`, and packed documents and
            sliding windows to its masks; `"cudnn"` prefers cuDNN's kernel, `"flash4"` is FlashAttention-4, `"te"`
            TransformerEngine. All three run documents and windows without masks, `"cudnn"` by torch's flash attention.
        layers: `"compiled"` runs what a decoder layer has around its experts through torch.compile, in training.
        loss: `"fused"` computes head and loss by chunks, where the caller passes `skip_logits=True`.
    """

    experts: ExpertsChoice = "auto"
    dispatch: DispatchChoice = "auto"
    norm: NormChoice = "auto"
    mamba: MambaChoice = "auto"
    sdpa: SdpaChoice = "auto"
    layers: LayersChoice = "auto"
    loss: LossChoice = "auto"
    linear_attention: LinearAttentionChoice = "auto"
    linear: LinearChoice = "auto"
    router: RouterChoice = "auto"

    @classmethod
    def parse(cls, value: str | Backend | Mapping[str, str] | None) -> Backend:
        """A `Backend` from `"auto"`, `"torch"` (references everywhere), `"te"` (TransformerEngine wherever it has a
        kernel), or a mapping such as `{"experts": "torch"}`.

        Raises:
            UsageError: an unknown layer or kernel; the message names the nearest one.
        """
        if isinstance(value, Backend):
            return value
        if value is None or value == "auto":
            return cls()
        if isinstance(value, str):
            value = _EVERYWHERE.get(value) or {"experts": value}
        choices = {layer: get_args(choice) for layer, choice in _CHOICES.items()}
        for layer, kernel in value.items():
            if layer not in choices:
                raise UsageError(
                    f"backend names no kind of layer {layer!r}",
                    hint=f"did you mean {nearest(layer, choices) or ' or '.join(choices)}?",
                )
            if kernel not in choices[layer]:
                raise UsageError(
                    f"no {layer} backend is called {kernel!r}", hint=f"choose one of {', '.join(choices[layer])}"
                )
        return cls(**value)


_CHOICES = {
    "experts": ExpertsChoice,
    "dispatch": DispatchChoice,
    "norm": NormChoice,
    "mamba": MambaChoice,
    "linear_attention": LinearAttentionChoice,
    "sdpa": SdpaChoice,
    "layers": LayersChoice,
    "loss": LossChoice,
    "linear": LinearChoice,
    "router": RouterChoice,
}
_REFERENCES = ("torch", "eager", "all_to_all")
_EVERYWHERE = {
    "torch": {
        layer: next(name for name in _REFERENCES if name in get_args(choice)) for layer, choice in _CHOICES.items()
    },
    "te": {layer: "te" for layer, choice in _CHOICES.items() if "te" in get_args(choice)},
}


@dataclass(frozen=True, slots=True)
class Resolved(Generic[Kernel]):
    """The kernel that runs, and why a faster one does not (empty when it is the fastest)."""

    kernel: Kernel
    reason: str = ""


def refuse(layer: str, kernel: str, obstacle: str) -> NoReturn:
    """Raise what becomes of a kernel that was asked for by name and cannot run."""
    raise UsageError(f"the {layer} backend {kernel} cannot run here: {obstacle}", hint='use backend="auto"')


def named_or_fastest(layer: str, asked: str, fast: str, obstacle: Callable[[], str | None]) -> Resolved:
    """What runs, of `"torch"` and a faster kernel.

    Raises:
        UsageError: the faster one was asked for by name and cannot run.
    """
    if asked == "torch":
        return Resolved("torch", "asked for")
    found = obstacle()
    if found is None:
        return Resolved(fast)
    if asked == fast:
        refuse(layer, fast, found)
    return Resolved("torch", found)


def resolve_norm(backend: Backend, device: torch.device, dtype: torch.dtype) -> Resolved:
    """The RMSNorm kernel. `auto` takes the fused one on accelerators in half precision, where it saves bandwidth.

    Raises:
        UsageError: `te` was asked for by name and cannot run.
    """
    if backend.norm == "te" and (obstacle := te_obstacle(device, dtype)):
        refuse("norm", "te", obstacle)
    if backend.norm != "auto":
        return Resolved(backend.norm, "" if backend.norm == "fused" else "asked for")
    if device.type == "cpu":
        return Resolved("torch", "on CPU the reference rounds as transformers does, at no cost that matters")
    if dtype == torch.float32:
        return Resolved("torch", "FP32 keeps the reference")
    return Resolved("fused")


def resolve_layers(backend: Backend, device: torch.device, *, training: bool) -> Resolved:
    """Whether decoder layers run compiled. `auto` compiles on CUDA, and only to train: generation changes shapes."""
    if backend.layers != "auto":
        return Resolved(backend.layers, "" if backend.layers == "compiled" else "asked for")
    if device.type != "cuda":
        return Resolved("eager", "layers are compiled on CUDA")
    if not is_installed("triton"):
        return Resolved("eager", "compiling needs triton, which is not installed")
    return Resolved("compiled") if training else Resolved("eager", "layers are compiled to train")


def resolve_loss(backend: Backend, device: torch.device) -> Resolved:
    """How head and loss are computed where nobody wants the logits."""
    if backend.loss != "auto":
        return Resolved(backend.loss, "" if backend.loss == "fused" else "asked for")
    obstacle = fused_loss_obstacle(device)
    return Resolved("fused") if obstacle is None else Resolved("torch", obstacle)


def require_attention(name: str | None) -> None:
    """Refuse an attention implementation that native models do not have.

    Raises:
        UsageError: `name` is neither None nor one of `ATTENTION_KERNELS`.
    """
    if name is not None and name not in ATTENTION_KERNELS:
        raise UsageError(
            f"native models have no attention implementation {name!r}",
            hint=f"pass attn_implementation={' or '.join(map(repr, ATTENTION_KERNELS))}",
        )


class Placement(NamedTuple):
    """Where parameters are, or would be: what kernels are chosen by."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class BackendRow:
    """One kind of layer: how many the model has, what runs them, and why not a faster kernel."""

    layer: str
    count: int
    kernel: str
    reason: str


@dataclass(frozen=True, slots=True)
class BackendReport:
    """What runs each kind of layer of a model; `str(report)` is an aligned table."""

    rows: tuple[BackendRow, ...]

    def __str__(self) -> str:
        table = [("layer", "count", "runs", "why not faster")]
        table += [(row.layer, str(row.count), row.kernel, row.reason or "-") for row in self.rows]
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        return "\n".join(
            "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in table
        )

    def log(self) -> None:
        """Say once what falls short of the fastest kernel without having been asked for."""
        for row in self.rows:
            if row.reason and row.reason != "asked for":
                log_once(_logger, logging.INFO, f"{row.layer}: running {row.kernel}: {row.reason}")
