"""Which implementation runs each kind of layer, and why not a faster one.

A `Backend` is what the user asked for, one field per kind of layer. The `resolve_*` functions turn it into the
kernel that runs on a device and dtype, with the reason; layers and `BackendReport` use the same functions, so
that the report is what happens. A kernel that was asked for by name and cannot run is an error, never a fallback;
only `sdpa` is a preference, behind which torch's own order follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn, get_args

import torch

from automodel.kernels import measured
from automodel.kernels.activations import SWIGLU, GatedActivation, Ungated
from automodel.kernels.choice import fused_choice_obstacle
from automodel.kernels.cross_entropy import fused_loss_obstacle
from automodel.kernels.delta_rule import DeltaRuleKernel, fla_obstacle
from automodel.kernels.experts import ExpertsKernel, fused_obstacle, grouped_mm_obstacle
from automodel.kernels.mamba import MambaKernel, fused_mamba_obstacle
from automodel.kernels.packages import is_installed
from automodel.kernels.short_conv import causal_conv1d_obstacle
from automodel.kernels.sonic import sonic_obstacle
from automodel.kernels.te import LinearKernel, alignment_obstacle, te_obstacle
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


@dataclass(frozen=True, slots=True)
class Backend:
    """The implementation wanted for each kind of layer; `"auto"` takes the fastest that can run.

    Attributes:
        experts: `"torch"` loops over experts, `"grouped_mm"` multiplies all of them in one call, `"fused"` also has
            Triton kernels around the products, `"sonic"` is SonicMoE's products, which do that work themselves, `"te"`
            runs TransformerEngine's products, an expert at a time. `"auto"` goes by `measured.sonic_wins`.
        dispatch: how tokens reach experts on other processes: `"all_to_all"` through collectives between which the
            host waits for the device, `"symmetric"` through memory that GPUs of one host read from each other,
            `"deepep"` through DeepEP, which was measured to take longer.
        router: `"torch"` is softmax and topk, `"fused"` both as one kernel, for routers without groups.
        mamba: `"torch"` is the reference, `"fused"` the kernels of mamba_ssm and causal_conv1d.
        norm: `"torch"` rounds as transformers does, `"fused"` is `torch.nn.functional.rms_norm`, `"te"`
            TransformerEngine's.
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
WEIGHING: tuple[ExpertsKernel, ...] = ("fused", "sonic")
"""Experts that apply the routing weights themselves."""
_REFERENCES = ("torch", "eager", "all_to_all")
_EVERYWHERE = {
    "torch": {
        layer: next(name for name in _REFERENCES if name in get_args(choice)) for layer, choice in _CHOICES.items()
    },
    "te": {layer: "te" for layer, choice in _CHOICES.items() if "te" in get_args(choice)},
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """The kernel that runs, and why a faster one does not (empty when it is the fastest)."""

    kernel: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ResolvedExperts(Resolved):
    """`Resolved` for experts."""

    kernel: ExpertsKernel = "torch"


@dataclass(frozen=True, slots=True)
class ResolvedDispatch(Resolved):
    """`Resolved` for the dispatch of tokens to experts."""

    kernel: DispatchKernel = "all_to_all"


@dataclass(frozen=True, slots=True)
class ResolvedMamba(Resolved):
    """`Resolved` for Mamba-2 layers."""

    kernel: MambaKernel = "torch"


def refuse(layer: str, kernel: str, obstacle: str) -> NoReturn:
    """Raise what becomes of a kernel that was asked for by name and cannot run."""
    raise UsageError(f"the {layer} backend {kernel} cannot run here: {obstacle}", hint='use backend="auto"')


def resolve_experts(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    width: int,
    activation: GatedActivation | Ungated = SWIGLU,
    *,
    bias: bool = False,
    divided: bool = False,
) -> ResolvedExperts:
    """The experts kernel for parameters [E, 2 * width, hidden] on `device` in `dtype`.

    Args:
        divided: whether processes divide the experts; symmetric dispatch is part of the fused kernel.

    Raises:
        UsageError: a kernel was asked for by name and cannot run.
    """

    def fused() -> str | None:
        return fused_obstacle(device, dtype, hidden, width, activation)

    def sonic() -> str | None:
        return sonic_obstacle(device, dtype, hidden, width, activation, bias=bias)

    if backend.experts == "sonic":
        if found := sonic():
            refuse("experts", "sonic", found)
        return ResolvedExperts("sonic")
    if backend.experts == "te":
        if found := te_obstacle(device, dtype) or alignment_obstacle("te", hidden, width):
            refuse("experts", "te", found)
        return ResolvedExperts("te", "asked for")
    reason = ""
    if backend.experts == "auto" and not divided and measured.sonic_wins(activation) and fused() is None:
        if (found := sonic()) is None:
            return ResolvedExperts("sonic")
        reason = found
    for kernel, obstacle in (
        ("fused", fused),
        ("grouped_mm", lambda: grouped_mm_obstacle(device, dtype, hidden, width)),
    ):
        if backend.experts not in ("auto", kernel):
            reason = "asked for"
            continue
        found = obstacle()
        if found is None:
            return ResolvedExperts(kernel, reason)
        if backend.experts == kernel:
            refuse("experts", kernel, found)
        reason = found
    return ResolvedExperts("torch", reason)


def resolve_dispatch(backend: Backend, experts: ExpertsKernel, obstacle: str | None) -> ResolvedDispatch:
    """How tokens reach experts on other processes.

    Args:
        experts: the kernel that multiplies; symmetric dispatch is part of the fused one.
        obstacle: why the processes cannot read each other's memory, None where they can.

    Raises:
        UsageError: `symmetric` or `deepep` was asked for by name and cannot run.
    """
    if backend.dispatch == "all_to_all":
        return ResolvedDispatch("all_to_all", "asked for")
    if backend.dispatch == "deepep":
        if experts not in WEIGHING:
            refuse(
                "dispatch",
                "deepep",
                "it adds up a token's rows where their experts are, which have to weight them, as "
                f"{' and '.join(WEIGHING)} do, and these run {experts}",
            )
        return ResolvedDispatch("deepep")
    if obstacle is None and experts != "fused":
        obstacle = f"symmetric dispatch is part of the fused experts, and these run {experts}"
    if obstacle is None:
        return ResolvedDispatch("symmetric")
    if backend.dispatch == "symmetric":
        refuse("dispatch", "symmetric", obstacle)
    return ResolvedDispatch("all_to_all", obstacle)


def resolve_mamba(
    backend: Backend, device: torch.device, dtype: torch.dtype, channels: int, width: int
) -> ResolvedMamba:
    """The kernels of Mamba-2 layers whose convolution has `channels` and a kernel of `width`.

    Raises:
        UsageError: `fused` was asked for by name and cannot run.
    """
    kernel, reason = _named_or_fastest(
        "mamba", backend.mamba, "fused", lambda: fused_mamba_obstacle(device, dtype, channels, width)
    )
    return ResolvedMamba(kernel, reason)


def _named_or_fastest(layer: str, asked: str, fast: str, obstacle: Callable[[], str | None]) -> tuple[str, str]:
    """The kernel that runs, of `"torch"` and a faster one, and why not the faster one."""
    if asked == "torch":
        return "torch", "asked for"
    found = obstacle()
    if found is None:
        return fast, ""
    if asked == fast:
        refuse(layer, fast, found)
    return "torch", found


def resolve_router(backend: Backend, device: torch.device, experts: int) -> Resolved:
    """What chooses among `experts` by softmax.

    Raises:
        UsageError: `fused` was asked for by name and cannot run.
    """
    return Resolved(
        *_named_or_fastest("router", backend.router, "fused", lambda: fused_choice_obstacle(device, experts))
    )


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


@dataclass(frozen=True, slots=True)
class ResolvedDeltaRule(Resolved):
    """`Resolved` for the gated delta rule."""

    kernel: DeltaRuleKernel = "torch"


def resolve_delta_rule(
    backend: Backend, device: torch.device, dtype: torch.dtype, *, training: bool
) -> ResolvedDeltaRule:
    """The kernel of the gated delta rule for activations of `dtype`.

    Raises:
        UsageError: `fla` was asked for by name and cannot run.
    """
    kernel, reason = _named_or_fastest(
        "linear attention", backend.linear_attention, "fla", lambda: fla_obstacle(device, dtype, training=training)
    )
    return ResolvedDeltaRule(kernel, reason)


def resolve_short_conv(backend: Backend, device: torch.device) -> Resolved:
    """The kernel of the convolution before the gated delta rule: `"fused"` or `"torch"`."""
    if backend.linear_attention == "torch":
        return Resolved("torch", "asked for")
    obstacle = causal_conv1d_obstacle(device)
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
