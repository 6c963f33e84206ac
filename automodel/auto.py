"""`NeMoAutoModelFor*`: transformers' auto classes, with native models where there are some, and sharding over a mesh.

A native family is built on the meta device, sharded if there is a mesh, and filled straight from the checkpoint's
files, each process reading only the bytes that it holds; the same code serves one process and many. Any other
architecture is transformers' own class, and says so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, PreTrainedModel

from automodel import fallback
from automodel.backends import Backend, require_attention
from automodel.compat import PreTrainedConfig, config_dtype, merge_dtype, require_known, resolve_dtype
from automodel.logging import get_logger, log_once
from automodel.models import NATIVE_MODELS
from automodel.models.causal_lm import NativeCausalLM
from automodel.models.initialize import initialize
from automodel.models.saving import attach_source
from automodel.parallel.fsdp import parallelize
from automodel.parallel.materialize import allocate, load_parameters
from automodel.parallel.mesh import MeshConfig, ParallelMesh
from automodel.sources import Location, locate, require_config, without_hub_options
from ckpt_tools.core.errors import UsageError
from ckpt_tools.engine.checkpoint import Checkpoint, open_checkpoint, read_config

_logger = get_logger(__name__)

_LOADER_ARGUMENTS = frozenset({"device_map", "gguf_file", "output_loading_info", "quantization_config", "state_dict"})
"""Arguments that are about loading, although a config may have a field of that name."""

_HONOURED = frozenset({"device_map", "output_loading_info", "quantization_config"})
_ONLY_OFF = (None, False)
DEQUANTISED = ("fp8", "mxfp4", "compressed-tensors", "modelopt")
"""Quantisation methods of checkpoints that native models read; names and dtypes decide which form it is."""

_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "low_cpu_mem_usage": (None, True, False),
    "use_safetensors": (None, True),
    "weights_only": (None, True, False),
}
"""Values of other loader arguments that ask for what happens anyway."""


class _NeMoAutoModel:
    """What the public classes share; a subclass names the transformers auto class that it stands in for."""

    transformers_class: str

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is not instantiated; call {name}.from_pretrained(...) or {name}.from_config(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: object,
        config: PreTrainedConfig | str | Path | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
        device_mesh: DeviceMesh | ParallelMesh | MeshConfig | None = None,
        backend: str | Mapping[str, str] | Backend = "auto",
        device: str | torch.device | int | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """A model with the weights of a checkpoint, in evaluation mode; drop-in for transformers' method.

        Weights in FP8 and MXFP4 become plain parameters while they are read, those of each process alone.

        Args:
            pretrained_model_name_or_path: directory of a Hugging Face repository or of a native checkpoint, or
                `org/name[@revision]` on the Hub.
            model_args: positional arguments for a transformers class.
            config: a config, or where to find one; by default the checkpoint's own.
            dtype: `"auto"` (the checkpoint's), a torch dtype or its name. By default as in the installed
                transformers: `"auto"` in 5.x, FP32 in 4.57.
            torch_dtype: older spelling of `dtype`.
            attn_implementation: `"sdpa"` (default) or `"eager"` for native models; what transformers knows for others.
            trust_remote_code: allow a repository's own Python code, for models that are not native.
            revision: branch, tag or commit on the Hub.
            device_mesh: shard the model over these processes: a `DeviceMesh` with axes from `dp_replicate`,
                `dp_shard` and `ep`, a `MeshConfig` that builds one, or a `ParallelMesh` with dtypes of computation.
            backend: kernels of native models; `"auto"`, `"torch"`, a mapping such as `{"experts": "torch"}`, or a
                `Backend`.
            device: where an unsharded model goes; None is the CPU, as in transformers.
            kwargs: fields of the config, Hub options and loader options of transformers' method.

        Raises:
            CkptError: the checkpoint is missing, incomplete or damaged, or an argument cannot be honoured.
        """
        request = fallback.Request(
            cls.transformers_class, model_args, merge_dtype(dtype, torch_dtype), attn_implementation, trust_remote_code
        )
        mesh = device_mesh.build() if isinstance(device_mesh, MeshConfig) else device_mesh
        config, location, unused = _read_config(
            pretrained_model_name_or_path, config, revision, trust_remote_code, kwargs
        )
        if location.is_native:
            config = _unquantised(config)
        model_class = cls._native_class(config)
        if model_class is None:
            cls._explain_fallback(config)
            # A repository's device_map is for transformers itself.
            place = _device(device, unused if location.is_native else {})
            return fallback.from_pretrained(
                request, pretrained_model_name_or_path, location, config, mesh, place, revision, unused
            )
        device = _device(device, unused)
        _refuse_unsupported(model_class, config, model_args, unused)
        config = _unquantised(config)
        if not location.has_weights:
            location = locate(pretrained_model_name_or_path, revision=revision, options=kwargs)
        checkpoint = open_checkpoint(location.root)
        chosen = _dtype_of(request.dtype, config, checkpoint)
        model = _build(model_class, config, chosen, attn_implementation, backend, count_predict_layers(checkpoint))
        parallelize(model, mesh)
        load_parameters(model, checkpoint, device=device)
        attach_source(model, location)
        model.eval()
        model.backend_report().log()
        return (model, dict(_NOTHING_AMISS)) if unused.get("output_loading_info") else model

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        *,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool | None = None,
        device_mesh: DeviceMesh | ParallelMesh | MeshConfig | None = None,
        backend: str | Mapping[str, str] | Backend = "auto",
        device: str | torch.device | int | None = None,
        predict_layers: int = 0,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """A model with fresh weights; drop-in for transformers' method.

        The weights of a native model depend on torch's random seed and on the config, not on the mesh, and are not
        quantised even if the config is of a quantised checkpoint.

        Args:
            config: of the model.
            dtype: of the parameters; by default the config's, else torch's default dtype.
            torch_dtype: older spelling of `dtype`.
            attn_implementation, trust_remote_code, device_mesh, backend, device: as in `from_pretrained`.
            predict_layers: layers for multi-token prediction that a native model holds, to be filled from a checkpoint
                that has them; fresh models need none, whatever the config counts.
            kwargs: for a transformers class.

        Raises:
            CkptError: an argument cannot be honoured.
        """
        chosen = dtype if dtype is not None or torch_dtype is None else torch_dtype
        chosen = resolve_dtype(chosen) if chosen not in (None, "auto") else config_dtype(config)
        chosen = chosen or torch.get_default_dtype()
        mesh = device_mesh.build() if isinstance(device_mesh, MeshConfig) else device_mesh
        model_class = cls._native_class(config)
        if model_class is None:
            cls._explain_fallback(config)
            request = fallback.Request(cls.transformers_class, (), chosen, attn_implementation, trust_remote_code)
            return fallback.from_config(request, config, mesh, _device(device, {}), kwargs)
        device = _device(device, kwargs)
        config = _unquantised(config)
        _refuse_unsupported(model_class, config, (), kwargs)
        model = _build(model_class, config, chosen, attn_implementation, backend, predict_layers)
        parallelize(model, mesh)
        allocate(model, device)
        initialize(model)
        model.backend_report().log()
        return model

    @classmethod
    def _native_class(cls, config: PreTrainedConfig) -> type[NativeCausalLM] | None:
        if cls.transformers_class != "AutoModelForCausalLM":
            return None
        found = NATIVE_MODELS.get(config.model_type)
        return found if found is not None and isinstance(config, found.config_class) else None

    @classmethod
    def _explain_fallback(cls, config: PreTrainedConfig) -> None:
        log_once(_logger, logging.INFO, f"loading transformers' own class: {cls._fallback_reason(config)}")

    @classmethod
    def _fallback_reason(cls, config: PreTrainedConfig) -> str:
        families = ", ".join(sorted(NATIVE_MODELS))
        return (
            f"{config.model_type} has no native {cls.transformers_class.removeprefix('Auto')} (native causal language "
            f"models: {families})"
        )


class NeMoAutoModelForCausalLM(_NeMoAutoModel):
    """Causal language models: native where the family has one, transformers' otherwise."""

    transformers_class = "AutoModelForCausalLM"


class NeMoAutoModelForImageTextToText(_NeMoAutoModel):
    """Vision-language models, by transformers' classes."""

    transformers_class = "AutoModelForImageTextToText"


class NeMoAutoModelForSequenceClassification(_NeMoAutoModel):
    """Sequence classifiers, by transformers' classes."""

    transformers_class = "AutoModelForSequenceClassification"


class NeMoAutoModelForTextToWaveform(_NeMoAutoModel):
    """Text-to-audio models, by transformers' classes."""

    transformers_class = "AutoModelForTextToWaveform"


def empty_model(source: str | Path, checkpoint: Checkpoint | None = None) -> tuple[PreTrainedModel, str]:
    """The model that `NeMoAutoModelForCausalLM.from_pretrained(source)` fills, on the meta device: no weights are read.

    Args:
        source: as there; a directory with config.json alone will do.
        checkpoint: of its weights, where there are some: they may decide the dtype and have layers of their own.

    Returns:
        the model, and why it is transformers' own class (empty where it is native).

    Raises:
        CkptError: `from_pretrained` would refuse.
    """
    config, location, _ = _read_config(source, None, None, False, {})
    if location.is_native:
        config = _unquantised(config)
    dtype = config_dtype(config) if checkpoint is None else _dtype_of("auto", config, checkpoint)
    model_class = NeMoAutoModelForCausalLM._native_class(config)
    if model_class is None:
        request = fallback.Request(NeMoAutoModelForCausalLM.transformers_class, (), "auto", None, False)
        return fallback.empty(request, config, dtype), NeMoAutoModelForCausalLM._fallback_reason(config)
    _refuse_unsupported(model_class, config, (), {})
    predict_layers = 0 if checkpoint is None else count_predict_layers(checkpoint)
    dtype = dtype or torch.get_default_dtype()
    return _build(model_class, _unquantised(config), dtype, None, "auto", predict_layers), ""


_NOTHING_AMISS: dict[str, list[str]] = {
    "missing_keys": [],
    "unexpected_keys": [],
    "mismatched_keys": [],
    "error_msgs": [],
}


def _read_config(
    source: str | Path,
    config: PreTrainedConfig | str | Path | None,
    revision: str | None,
    trust_remote_code: bool | None,
    kwargs: Mapping[str, Any],
) -> tuple[PreTrainedConfig, Location, dict[str, Any]]:
    """The config, where the checkpoint's side files are, and the arguments that are no config fields."""
    location = locate(source, revision=revision, options=kwargs, weights=False)
    rest = without_hub_options(kwargs)
    if isinstance(config, PreTrainedConfig):
        return config, location, rest
    loader = {name: rest.pop(name) for name in _LOADER_ARGUMENTS if name in rest}
    root = location.side_root if config is None else config
    if config is None:
        require_config(location)
    if config is None and not trust_remote_code:
        require_known(read_config(root).get("model_type"))
    found, unused = AutoConfig.from_pretrained(
        root, trust_remote_code=trust_remote_code, return_unused_kwargs=True, **rest
    )
    unused.pop("trust_remote_code", None)
    return found, location, {**loader, **unused}


def _build(
    model_class: type[NativeCausalLM],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attn_implementation: str | None,
    backend: str | Mapping[str, str] | Backend,
    predict_layers: int,
) -> NativeCausalLM:
    """The model on the meta device."""
    require_attention(attn_implementation)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    with torch.device("meta"):
        model = model_class(config, backend=Backend.parse(backend), predict_layers=predict_layers)
    config.dtype = dtype
    return model.to(dtype)


def count_predict_layers(checkpoint: Checkpoint) -> int:
    """Layers for multi-token prediction that a checkpoint has; its names decide, not its config."""
    return sum("predict" in kind.split("+") for kind in checkpoint.layout.layers)


def _unquantised(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of plain parameters, which is what a model has whatever its checkpoint is stored in."""
    if getattr(config, "quantization_config", None) is not None:
        config = copy.copy(config)
        del config.quantization_config
    return config


def _dtype_of(wanted: object, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if wanted != "auto":
        return resolve_dtype(wanted)
    found = config_dtype(config)
    if found is not None:
        return found
    floats = [dtype.torch_name for dtype in checkpoint.leaf_dtypes().values() if dtype.is_float]
    return getattr(torch, floats[0]) if floats else torch.get_default_dtype()


def _device(device: str | torch.device | int | None, options: Mapping[str, Any]) -> torch.device | None:
    """One device from `device`, or from a `device_map` that names a single one."""
    given = options.get("device_map")
    if device is None and given is not None:
        device = next(iter(given.values())) if isinstance(given, Mapping) and len(given) == 1 else given
        if device == "auto":
            device = torch.accelerator.current_accelerator() or "cpu"
        if isinstance(device, Mapping) or device in ("balanced", "balanced_low_0", "sequential"):
            raise UsageError(
                f"a native model is not spread over devices by device_map={given!r}",
                hint="shard it over processes with device_mesh=, or name one device",
            )
    return None if device is None else torch.device(device)


def _refuse_unsupported(
    model_class: type[NativeCausalLM],
    config: PreTrainedConfig,
    model_args: tuple[object, ...],
    options: Mapping[str, Any],
) -> None:
    """Refuse what a native model cannot honour, so that no argument is ignored in silence.

    Raises:
        UsageError: a checkpoint in a form that cannot be dequantised, or an argument without a meaning here.
    """
    described = getattr(config, "quantization_config", None)
    method = described.get("quant_method", "") if isinstance(described, Mapping) else described
    if described and method not in DEQUANTISED:
        raise UsageError(
            f"{model_class.__name__} does not load checkpoints quantised by {method}, only by {', '.join(DEQUANTISED)}",
            hint=f"transformers' {model_class.transformers_architecture} may",
        )
    if options.get("quantization_config"):
        raise UsageError(
            f"{model_class.__name__} does not quantise its parameters",
            hint="leave quantization_config out; a quantised checkpoint is dequantised as it is read",
        )
    refused = ["positional arguments"] if model_args else []
    refused += sorted(name for name, value in options.items() if not _is_harmless(name, value))
    if refused:
        raise UsageError(
            f"{model_class.__name__} does not take {', '.join(refused)}",
            hint=f"transformers' {model_class.transformers_architecture} may; it loads the same checkpoint",
        )


def _is_harmless(name: str, value: object) -> bool:
    # By identity: values may be tensors or mappings of them.
    return name in _HONOURED or any(value is allowed for allowed in _WITHOUT_EFFECT.get(name, _ONLY_OFF))
