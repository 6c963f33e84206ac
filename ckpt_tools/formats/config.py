"""A config.json that transformers 4 and 5, vLLM and SGLang read alike: both spellings of every renamed field.

transformers 4 reads `rope_theta`, `rope_scaling` and `torch_dtype` and falls back silently to defaults when it finds
only the names of transformers 5, `rope_parameters` and `dtype`. Fields are added, and none is dropped: both spellings,
and what transformers does not write although vLLM or SGLang read it without a default. One value is spelled
anew instead: Nemotron's `layers_block_type`, in names that all of them take.
"""

from __future__ import annotations

import copy
from typing import Final

from ckpt_tools.core.configs import check_counts, config_errors
from ckpt_tools.core.dtypes import BY_TORCH_NAME, DType
from ckpt_tools.core.errors import UsageError

_EXPERT_ALIASES: Final = ("num_experts", "num_local_experts")
_EXPERT_ALIAS_FAMILIES: Final = frozenset({"qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text"})
_INTERVAL_FAMILIES: Final = frozenset({"qwen3_next", "qwen3_5_moe_text", "qwen3_5_text"})
"""Families with full attention in every so many layers: `full_attention_interval` (SGLang), or a list of all layers."""
_ARCHITECTURES: Final = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
}
_DEEPSEEK_V3: Final = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
_MINIMAX_M2: Final = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
}
_REQUIRED: Final[dict[str, dict[str, object]]] = {
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "minimax_m2": _MINIMAX_M2,
}
"""Fields by `model_type`, with the one value that the family's transformers class computes with."""
_NEMOTRON_LETTERS: Final = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
_NEMOTRON_SPELLINGS: Final = {"linear_attention": "mamba", "full_attention": "attention"}
_NESTED: Final = ("text_config", "llm_config")
_LOCAL, _GLOBAL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"


@config_errors()
def portable_config(config: dict[str, object], *, dtype: DType | None = None) -> dict[str, object]:
    """A copy of `config` with both spellings of every field that readers spell differently.

    Args:
        config: the source's config.json.
        dtype: element type of the files that are written; replaces both dtype fields where it is given.

    Raises:
        UsageError: `dtype` is no torch type.
        LayoutError: a field has a value that cannot be read.
    """
    result = copy.deepcopy(config)
    _complete(result, None if dtype is None else _torch_name(dtype), top=True)
    return result


def config_dtype(config: dict[str, object]) -> DType | None:
    """The element type that config.json names, at the top or in its text part."""
    for part in (config, *(config.get(key) for key in _NESTED)):
        if isinstance(part, dict):
            name = part.get("dtype") or part.get("torch_dtype")
            if isinstance(name, str):
                return BY_TORCH_NAME.get(name.removeprefix("torch."))
    return None


def _torch_name(dtype: DType) -> str:
    if dtype.torch_name is None:
        raise UsageError(f"config.json cannot name the element type {dtype}, which torch has not")
    return dtype.torch_name


def _complete(config: dict[str, object], dtype: str | None, *, top: bool) -> None:
    check_counts(config)
    if config.get("model_type") == "minimax_m2":
        _complete_partial_rope(config)
    _complete_rope(config)
    _complete_dtype(config, dtype, top=top)
    model_type = config.get("model_type")
    if model_type in _EXPERT_ALIAS_FAMILIES:
        _mirror(config, *_EXPERT_ALIASES)
    if model_type == "nemotron_h":
        _complete_nemotron(config)
    if model_type in _INTERVAL_FAMILIES:
        _complete_layer_types(config)
    if isinstance(model_type, str):
        for name, value in _REQUIRED.get(model_type, {}).items():
            config.setdefault(name, value)
    if top and not config.get("architectures") and isinstance(model_type, str) and model_type in _ARCHITECTURES:
        config["architectures"] = [_ARCHITECTURES[model_type]]
    for key in _NESTED:
        part = config.get(key)
        if isinstance(part, dict):
            _complete(part, dtype, top=False)


def _complete_nemotron(config: dict[str, object]) -> None:
    """The kinds of layer as vLLM's and NVIDIA's own code read them (a string) and as SGLang does (older names).

    SGLang refuses the names that transformers 5 gives kinds of layer; transformers 5 takes the older ones for its own.
    """
    for part in ("", "mtp_"):
        listed, letters = f"{part}layers_block_type", f"{part}hybrid_override_pattern"
        kinds = config.get(listed)
        if isinstance(kinds, list):
            older = [_NEMOTRON_SPELLINGS.get(str(kind), str(kind)) for kind in kinds]
            config[listed] = older
            if set(older) <= _NEMOTRON_LETTERS.keys():
                config.setdefault(letters, "".join(_NEMOTRON_LETTERS[kind] for kind in older))
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        config.setdefault("num_hidden_layers", len(pattern))
    _mirror(config, "n_groups", "mamba_n_groups")


def _mirror(config: dict[str, object], first: str, second: str) -> None:
    if config.get(first) is not None:
        config.setdefault(second, config[first])
    elif config.get(second) is not None:
        config[first] = config[second]


def _complete_layer_types(config: dict[str, object]) -> None:
    """`layer_types` from `full_attention_interval`, and back where the layers have one; without either it is 4."""
    types, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if isinstance(types, list):
        interval = types.index(_GLOBAL) + 1 if _GLOBAL in types else len(types) + 1
        if types == _alternating(len(types), interval):
            config.setdefault("full_attention_interval", interval)
    elif isinstance(layers, int):
        given = config.setdefault("full_attention_interval", 4)
        if isinstance(given, int) and given > 0:
            config["layer_types"] = _alternating(layers, given)


def _alternating(layers: int, interval: int) -> list[str]:
    return [_LINEAR if (index + 1) % interval else _GLOBAL for index in range(layers)]


def _complete_dtype(config: dict[str, object], dtype: str | None, *, top: bool) -> None:
    named = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None and (top or named is not None):
        named = dtype
    if named is not None:
        config["dtype"] = config["torch_dtype"] = named


def _complete_rope(config: dict[str, object]) -> None:
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        if any(isinstance(value, dict) for value in parameters.values()):
            _add_old_layered(config, parameters)
        else:
            _add_old(config, parameters)
    elif config.get("rope_theta") is not None:
        config["rope_parameters"] = _new_parameters(config)


def _complete_partial_rope(config: dict[str, object]) -> None:
    """MiniMax-M2 counts rotary dimensions (`rotary_dim`, which vLLM reads without a default), others say a part."""
    head_dim, count = config.get("head_dim"), config.get("rotary_dim")
    parameters = config.get("rope_parameters")
    fraction = config.get("partial_rotary_factor")
    if fraction is None and isinstance(parameters, dict):
        fraction = parameters.get("partial_rotary_factor")
    if not isinstance(head_dim, int):
        return
    if isinstance(count, int):
        fraction = count / head_dim if fraction is None else fraction
        config.setdefault("partial_rotary_factor", fraction)
    else:
        config["rotary_dim"] = int(head_dim * fraction) if isinstance(fraction, int | float) else head_dim


def _add_old(config: dict[str, object], parameters: dict[str, object]) -> None:
    """The fields of transformers 4 from one set of `rope_parameters`; fields that are there stay."""
    scaling = dict(parameters)
    theta = scaling.pop("rope_theta", None)
    fraction = scaling.pop("partial_rotary_factor", None)
    if theta is not None:
        config.setdefault("rope_theta", theta)
    if fraction is not None:
        config.setdefault("partial_rotary_factor", fraction)
    config.setdefault("rope_scaling", None if scaling.get("rope_type", "default") == "default" else scaling)


def _add_old_layered(config: dict[str, object], parameters: dict[str, object]) -> None:
    """The fields of transformers 4 from `rope_parameters` by layer type (Gemma 3): global, and local base frequency."""
    whole, local = parameters.get(_GLOBAL), parameters.get(_LOCAL)
    if isinstance(whole, dict):
        _add_old(config, whole)
    if isinstance(local, dict) and local.get("rope_theta") is not None:
        config.setdefault("rope_local_base_freq", local["rope_theta"])


def _new_parameters(config: dict[str, object]) -> dict[str, object]:
    """`rope_parameters` of transformers 5 from the fields of transformers 4."""
    scaling = config.get("rope_scaling")
    parameters: dict[str, object] = dict(scaling) if isinstance(scaling, dict) else {}
    parameters.setdefault("rope_type", parameters.pop("type", None) or "default")
    parameters["rope_theta"] = config["rope_theta"]
    if config.get("partial_rotary_factor") is not None:
        parameters["partial_rotary_factor"] = config["partial_rotary_factor"]
    local = config.get("rope_local_base_freq")
    if local is None:
        return parameters
    return {_GLOBAL: parameters, _LOCAL: {"rope_type": "default", "rope_theta": local}}
