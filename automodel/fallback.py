"""Architectures without a native model: transformers' own class, sharded by FSDP2 like the others.

In one process transformers loads a repository itself. On a mesh, and from a native checkpoint, the model is built on
the meta device and each process reads only its own bytes: where the family has a layout, or the files use the model's
parameter names. Where neither holds (transformers 5 renames and fuses some while loading), every process loads the
whole model on the host first, and a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from automodel.backends import BackendReport, BackendRow
from automodel.compat import PreTrainedConfig, config_dtype, resolve_dtype
from automodel.kernels.packages import is_installed
from automodel.logging import get_logger, log_once
from automodel.models.initialize import agreed_seed
from automodel.models.saving import add_saving, attach_source, layout_of
from automodel.parallel.expert_modules import give_every_expert_a_gradient
from automodel.parallel.fsdp import parallelize
from automodel.parallel.materialize import load_parameters
from automodel.parallel.mesh import ParallelMesh
from automodel.sources import Location, locate
from ckpt_tools.core.errors import LayoutError
from ckpt_tools.engine.checkpoint import open_checkpoint

_logger = get_logger(__name__)


_RENAMED = (
    "the family has no layout here, and transformers renames tensors only while it reads a repository: make one with "
    "`ckpt consolidate`, and load that"
)


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asked of the model.

    Attributes:
        auto_class: name of the transformers auto class.
        model_args: positional arguments of the model class.
        dtype: `"auto"`, a torch dtype or its name.
        attn_implementation: None lets transformers choose, which is SDPA where the model has it.
        trust_remote_code: allow a repository's own code.
    """

    auto_class: str
    model_args: tuple[object, ...]
    dtype: str | torch.dtype
    attn_implementation: str | None
    trust_remote_code: bool | None

    @property
    def loader(self) -> Any:
        """The transformers auto class."""
        return getattr(transformers, self.auto_class)

    def options(self) -> dict[str, Any]:
        """Keyword arguments that are set."""
        given = {"attn_implementation": self.attn_implementation, "trust_remote_code": self.trust_remote_code}
        return {name: value for name, value in given.items() if value is not None}


def from_pretrained(
    request: Request,
    source: str | Path,
    location: Location,
    config: PreTrainedConfig,
    mesh: DeviceMesh | ParallelMesh | None,
    device: torch.device | None,
    revision: str | None,
    kwargs: Mapping[str, Any],
) -> PreTrainedModel:
    """The transformers model of a checkpoint, sharded over `mesh` if there is one."""
    if mesh is None and not location.is_native:
        where = location.side_root if Path(source).expanduser().exists() else source
        hub = {} if revision is None or where is not source else {"revision": revision}
        model = request.loader.from_pretrained(
            where, *request.model_args, config=config, dtype=request.dtype, **request.options(), **hub, **kwargs
        )
        loaded = model[0] if isinstance(model, tuple) else model
        if device is not None:
            loaded.to(device)
        _report(loaded)
        return model
    if not location.has_weights:
        location = locate(source, revision=revision, options=kwargs)
    model = _load_by_parts(request, location, config, mesh, device, kwargs)
    attach_source(model, location)
    _report(model)
    return model.eval()


def from_config(
    request: Request,
    config: PreTrainedConfig,
    mesh: DeviceMesh | ParallelMesh | None,
    device: torch.device | None,
    kwargs: Mapping[str, Any],
) -> PreTrainedModel:
    """The transformers model with fresh weights, the same on every process of a mesh, then sharded."""
    if mesh is None:
        model = request.loader.from_config(config, dtype=request.dtype, **request.options(), **kwargs)
        model = model if device is None else model.to(device)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(agreed_seed())
            model = request.loader.from_config(config, dtype=request.dtype, **request.options(), **kwargs)
        _shard(model, mesh)
    _report(model)
    return model


def empty(request: Request, config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    """The transformers model on the meta device."""
    with torch.device("meta"), _ScalarsKeepTheirValue():
        return request.loader.from_config(config, dtype=dtype, **request.options())


def _load_by_parts(
    request: Request,
    location: Location,
    config: PreTrainedConfig,
    mesh: DeviceMesh | ParallelMesh | None,
    device: torch.device | None,
    kwargs: Mapping[str, Any],
) -> PreTrainedModel:
    dtype = config_dtype(config) if request.dtype == "auto" else resolve_dtype(request.dtype)
    try:
        model = empty(request, config, dtype)
        checkpoint = open_checkpoint(location.root)
        if checkpoint.is_encoded:
            # Its config makes transformers quantise the model, too.
            raise LayoutError(
                f"{checkpoint.root} is quantised ({checkpoint.layout.form})",
                hint="`ckpt convert --dequantize` makes a native checkpoint of it that loads by parts",
            )
        _shard(model, mesh)
        load_parameters(model, checkpoint, device=device)
    except LayoutError as error:
        if location.is_native:
            # transformers cannot read these files at all.
            raise LayoutError(error.message, hint=error.hint or _RENAMED) from None
        log_once(
            _logger,
            logging.WARNING,
            f"{location.root}: every process loads the whole model into host memory before it is sharded, because "
            f"its files cannot be read by parts: {error.message.splitlines()[0]}"
            + (f" (hint: {error.hint})" if error.hint else ""),
        )
    else:
        return model
    model = request.loader.from_pretrained(
        location.side_root, *request.model_args, config=config, dtype=request.dtype, **request.options(), **kwargs
    )
    _shard(model, mesh)
    return model


def _shard(model: PreTrainedModel, mesh: DeviceMesh | ParallelMesh | None) -> None:
    """Shard a model over `mesh`; where its layout is known, it keeps FP32 state and is saved by parts, too."""
    layout = layout_of(model, model.config.to_dict())
    if layout is not None:
        for name, buffer in list(model.named_buffers()):
            if name in layout.keeps_dtype:
                owner, _, own_name = name.rpartition(".")
                setattr(model.get_submodule(owner), own_name, buffer.float())
        add_saving(model)
    if mesh is not None:
        give_every_expert_a_gradient(model)
    parallelize(model, mesh)


class _ScalarsKeepTheirValue(TorchFunctionMode):
    """Inside `torch.device("meta")`: a tensor made of one Python number is no parameter, and no file has its value."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.tensor and args and isinstance(args[0], (bool, int, float)):
            options.setdefault("device", "cpu")
        return func(*args, **options)


def _report(model: PreTrainedModel) -> None:
    """Apply Liger kernels where they are installed and can run, and say what runs."""
    attention = model.config._attn_implementation
    liger = _liger_obstacle(model, next(model.parameters()).device)
    if liger is None:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    name = type(model).__name__
    kernels = "with Liger kernels" if liger is None else f"without Liger kernels: {liger}"
    log_once(_logger, logging.INFO, f"{name}: attention {attention}, {kernels}")


def backend_report(model: PreTrainedModel, device: torch.device) -> BackendReport:
    """What would run a transformers model whose parameters are on `device`."""
    obstacle = _liger_obstacle(model, device)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    kernels = "transformers" if obstacle else "Liger kernels"
    return BackendReport(
        (
            BackendRow("attention", layers, str(model.config._attn_implementation), ""),
            BackendRow("other layers", layers, kernels, f"no Liger kernels: {obstacle}" if obstacle else ""),
        )
    )


def _liger_obstacle(model: PreTrainedModel, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "they need CUDA"
    if not is_installed("liger_kernel"):
        return "liger-kernel is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    known = model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN
    return None if known else f"liger-kernel has none for {model.config.model_type}"
