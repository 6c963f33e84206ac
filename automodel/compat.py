"""Everything that differs between transformers 4.57 and 5.x, so that no other module asks which one is installed.

The native models call these functions with one set of arguments; each picks the spelling of the installed version.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import PretrainedConfig as PreTrainedConfig  # both versions have this spelling
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ckpt_tools.core.errors import UsageError

TRANSFORMERS_5: bool = int(transformers.__version__.split(".")[0]) >= 5
_ONLY_IN_5 = frozenset({"nemotron_h"})
"""`model_type` of the families here that transformers 4.57 does not know."""
_HAS_STATES = hasattr(Cache, "get_recurrent_state")  # else Qwen3-Next has a cache class of its own
_MASK_PARAMETERS = frozenset(inspect.signature(create_causal_mask).parameters)


def require_known(model_type: object) -> None:
    """Refuse a family that the installed transformers is too old for.

    Raises:
        UsageError: it is one, and which version has it.
    """
    if model_type in _ONLY_IN_5 and not TRANSFORMERS_5:
        raise UsageError(
            f"{model_type} needs transformers 5; {transformers.__version__} is installed",
            hint="pip install 'transformers>=5'; ckpt converts, consolidates and verifies it without transformers",
        )


def rope_type(config: PreTrainedConfig) -> str:
    """The config's kind of rotary embedding, `"default"` where it names none."""
    parameters = rope_parameters(config)
    # "type" is the spelling of configs written before transformers 4.43.
    return parameters.get("rope_type") or parameters.get("type") or "default"


def rope_frequencies(
    config: PreTrainedConfig, device: torch.device, seq_len: int | None = None
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and the factor on cos and sin, by transformers' own formula for the config's rope type.

    Args:
        config: a transformers config in either spelling. Stock 4.57 ignores the spelling of 5.x without a word.
        device: where the frequencies are computed and returned.
        seq_len: current length in tokens, for the types that depend on it (`dynamic`, `longrope`).

    Returns:
        `inv_freq` [rotary dims / 2] in FP32, and the attention factor.

    Raises:
        ValueError: the rope type is not one that transformers knows.
    """
    kind = rope_type(config)
    if kind == "default":
        return _default_frequencies(config, device), 1.0
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ValueError(f"unknown rope type {kind!r}; transformers knows {', '.join(sorted(ROPE_INIT_FUNCTIONS))}")
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](_in_installed_spelling(config), device, seq_len=seq_len)
    return inv_freq.to(device=device, dtype=torch.float32), float(factor)


def original_max_positions(config: PreTrainedConfig) -> int:
    """Sequence length that a `longrope` model was pretrained at, where its short factors end."""
    from_rope = rope_parameters(config).get("original_max_position_embeddings") if TRANSFORMERS_5 else None
    # 4.57 looks for it beside the rope fields, never inside them.
    return from_rope or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings


def rope_parameters(config: PreTrainedConfig) -> Mapping[str, Any]:
    """The config's description of its rotary embedding beyond the base, empty where it has none, in either spelling."""
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}


def _in_installed_spelling(config: PreTrainedConfig) -> PreTrainedConfig:
    parameters = getattr(config, "rope_parameters", None)
    if TRANSFORMERS_5 or not parameters:
        return config
    config = copy.copy(config)
    config.rope_scaling = dict(parameters)
    config.rope_theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    return config


def _default_frequencies(config: PreTrainedConfig, device: torch.device) -> torch.Tensor:
    # 5.x moved this formula from ROPE_INIT_FUNCTIONS into each model file, hence it is spelled here.
    parameters = rope_parameters(config)
    theta = parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    partial = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    dim = int(head_dim * partial)
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / dim
    return 1.0 / (theta**exponent)


def attention_mask_for(
    config: PreTrainedConfig,
    embeds_BSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    cache_position: torch.Tensor,
    sliding: bool,
) -> torch.Tensor | None:
    """The mask that `config._attn_implementation` takes: None where plain causal attention needs none.

    Args:
        embeds_BSD: input embeddings, for batch size, length, dtype and device.
        attention_mask: [B, keys] with 0 at padding, a prepared [B, 1, S, keys] mask, or None.
        past_key_values: the cache, when it may already hold keys.
        position_ids: [B, S] only where documents are packed (positions restart); None otherwise.
        cache_position: [S] index of each query token in the cache; read by 4.57 only.
        sliding: limit attention to the config's `sliding_window`.
    """
    within = not sliding or embeds_BSD.shape[1] <= config.sliding_window
    plain = attention_mask is None and past_key_values is None and position_ids is None
    if plain and within and config._attn_implementation == "sdpa":
        # transformers says the same, but makes a mask while a CUDA graph is captured.
        return None
    arguments: dict[str, object] = {
        "config": config,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        "inputs_embeds": embeds_BSD,
        "input_embeds": embeds_BSD,
        "cache_position": cache_position,
    }
    create = create_sliding_window_causal_mask if sliding else create_causal_mask
    return create(**{name: value for name, value in arguments.items() if name in _MASK_PARAMETERS})


def update_cache(
    cache: Cache,
    key_BGSd: torch.Tensor,
    value_BGSd: torch.Tensor,
    layer: int,
    cache_position: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append keys and values of one layer, and return all that the queries attend to."""
    if TRANSFORMERS_5:
        return cache.update(key_BGSd, value_BGSd, layer)
    return cache.update(key_BGSd, value_BGSd, layer, {"cache_position": cache_position})


def make_cache(config: PreTrainedConfig) -> Cache:
    """An empty cache that grows, of the kind that the config's layers need."""
    if not _HAS_STATES and "linear_attention" in (getattr(config, "layer_types", None) or ()):
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDynamicCache

        return Qwen3NextDynamicCache(config)
    return DynamicCache(config=config)


def padding_mask_for(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The mask [B, S] of a layer without a softmax: None where no token of this pass is padding.

    Args:
        attention_mask: [B, keys] with 0 at padding, a prepared mask of attention (which says nothing here), or None.
        length: S, tokens of this pass.
    """
    if attention_mask is None or attention_mask.ndim != 2 or length == 1:
        return None
    mask_BS = attention_mask[:, -length:]
    return None if bool((mask_BS == 1).all()) else mask_BS


def load_recurrent_state(cache: Cache, layer: int) -> torch.Tensor | None:
    """The state that a linear-attention layer left in the cache, None before its first pass.

    Raises:
        UsageError: the cache has no room for such states.
    """
    if _HAS_STATES:
        return cache.get_recurrent_state(layer)
    if not hasattr(cache, "recurrent_states"):
        raise UsageError(
            f"{type(cache).__name__} holds no states of linear attention",
            hint="leave past_key_values out: the model makes a cache that does",
        )
    return cache.recurrent_states[layer]


def save_recurrent_state(cache: Cache, layer: int, state: torch.Tensor) -> None:
    """Replace the state of a linear-attention layer."""
    if _HAS_STATES:
        cache.update_recurrent_state(state, layer)
    else:
        cache.recurrent_states[layer] = state


def extend_conv_columns(cache: Cache, x_BCS: torch.Tensor, layer: int, taps: int) -> torch.Tensor:
    """[B, C, taps - 1 + S]: this pass's columns behind those before them, the last `taps` of which the cache keeps."""
    if _HAS_STATES:
        whole = cache.update_conv_state(x_BCS, layer, conv_kernel_size=taps)
    else:
        before = cache.conv_states[layer]
        whole = x_BCS if before is None else torch.cat((before, x_BCS), dim=-1)
        cache.conv_states[layer] = F.pad(whole, (max(0, taps - whole.shape[-1]), 0))[..., -taps:]
    wanted = taps - 1 + x_BCS.shape[-1]
    return F.pad(whole, (max(0, wanted - whole.shape[-1]), 0))[..., -wanted:]


def tied_weights_keys(target: str, source: str) -> dict[str, str] | list[str]:
    """`_tied_weights_keys` of a model whose `target` parameter is its `source` parameter when the config ties them."""
    return {target: source} if TRANSFORMERS_5 else [target]


def config_dtype(config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that config.json records (`dtype`, or `torch_dtype` in older files)."""
    value = getattr(config, "dtype", None)
    if value is None and not TRANSFORMERS_5:
        value = getattr(config, "torch_dtype", None)
    return getattr(torch, value) if isinstance(value, str) else value


def merge_dtype(dtype: str | torch.dtype | None, torch_dtype: str | torch.dtype | None) -> str | torch.dtype:
    """One value from the two spellings of the argument; when neither is given, the installed version's default.

    transformers 5 loads in the checkpoint's dtype (`"auto"`), 4.57 in torch's default dtype.

    Raises:
        UsageError: both are given and differ.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise UsageError(f"dtype={dtype} and torch_dtype={torch_dtype} disagree", hint="give one of them")
    given = dtype if dtype is not None else torch_dtype
    if given is not None:
        return given
    return "auto" if TRANSFORMERS_5 else torch.get_default_dtype()


def resolve_dtype(dtype: object) -> torch.dtype:
    """A torch dtype from itself or its name (`bfloat16`, `torch.bfloat16`).

    Raises:
        UsageError: it names none.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise UsageError(f"{dtype!r} is not a dtype", hint='pass "auto", a torch dtype, or a name such as "bfloat16"')
    return found
