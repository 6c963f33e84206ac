"""What one family's config means for the shared decoder, as plain values.

A family file turns its transformers config into a `DecoderSpec`; no shared block reads a config field whose name
or default differs between families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers.activations import ACT2FN

from automodel.compat import PreTrainedConfig

AttentionKind = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Shape and routing of a family's expert layers.

    Attributes:
        num_experts, top_k, width: E, K and the width F of one expert.
        normalize: routing weights of a token sum to 1.
        float32_weights: routing weights stay in FP32 until they multiply the experts' outputs.
        jitter: half-width of the uniform noise that multiplies the layer's input in training.
        layers: indices of the layers that have experts.
    """

    num_experts: int
    top_k: int
    width: int
    normalize: bool
    layers: frozenset[int]
    float32_weights: bool = False
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Shape of a decoder.

    Attributes:
        num_heads, num_kv_heads, head_dim: H, G and the size of one head.
        qkv_bias, output_bias, mlp_bias: which projections carry a bias.
        qk_norm: RMSNorm over each query and key head before the rotary embedding.
        attention_kinds: full or sliding attention, one entry a layer.
        moe: None for a dense family.
    """

    hidden_size: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    activation: Callable[[torch.Tensor], torch.Tensor]
    attention_dropout: float
    attention_kinds: tuple[AttentionKind, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    moe: MoeSpec | None = None


def decoder_spec(
    config: PreTrainedConfig,
    *,
    attention_kinds: tuple[AttentionKind, ...],
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    moe: MoeSpec | None = None,
) -> DecoderSpec:
    """A `DecoderSpec` whose common part comes from the config fields that all families share."""
    return DecoderSpec(
        hidden_size=config.hidden_size,
        mlp_width=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        norm_eps=config.rms_norm_eps,
        activation=ACT2FN[config.hidden_act],
        attention_dropout=config.attention_dropout,
        attention_kinds=attention_kinds,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        moe=moe,
    )


def uniform_attention(config: PreTrainedConfig) -> tuple[AttentionKind, ...]:
    """The same attention in every layer: sliding where the config has a `sliding_window`."""
    sliding = getattr(config, "sliding_window", None) is not None
    return ("sliding_attention" if sliding else "full_attention",) * config.num_hidden_layers
