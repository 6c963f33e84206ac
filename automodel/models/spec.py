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
from automodel.kernels.activations import GatedActivation, Ungated

AttentionKind = Literal["full_attention", "sliding_attention", "linear_attention", "mlp", "moe"]
"""What mixes a layer's tokens; hybrids with one mixer a layer have layers that mix none."""


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Shape of multi-head latent attention.

    Attributes:
        query_rank: width of the latent that queries are made from; None projects them in one step.
        rank: width of the latent that keys and values are made from.
        nope_dim, rope_dim, value_dim: sizes of a head: without position, with rotary position, and of values.
        interleaved: rotary pairs are neighbours, not a half of the head apart.
        bias: the projections to latents, and the output projection, carry one.
        scale: of the attention scores.
    """

    query_rank: int | None
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool
    bias: bool
    scale: float


@dataclass(frozen=True, slots=True)
class DeltaNetSpec:
    """Shape of gated DeltaNet, the mixer of `linear_attention` layers.

    Attributes:
        key_heads, value_heads: G and H; the queries and keys of one key head serve H / G value heads.
        key_dim, value_dim: sizes of a key and of a value.
        conv_kernel: taps of the causal convolution.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Group-limited routing by sigmoid scores: number of groups, groups that a token's experts come from, the factor on
    the routing weights, and whether the router's projection stays in FP32."""

    num_groups: int
    top_groups: int
    scale: float
    keeps_float32: bool = False


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Shape and routing of a family's expert layers.

    Attributes:
        num_experts, top_k, width: E, K and the width F of one expert.
        normalize: routing weights of a token sum to 1.
        float32_weights: routing weights stay in FP32 until they multiply the experts' outputs.
        jitter: half-width of the uniform noise that multiplies the layer's input in training.
        layers: indices of the layers that have experts.
        activation: of the gate half and the up half; None is the decoder's activation times the up half. `Ungated` for
            experts without a gate, the shared ones too.
        bias: the experts' projections carry biases.
        router_bias: the router's projection carries one.
        softmax_over_chosen: routing weights are the softmax of the K largest logits, not of all of them.
        groups: None for routing by softmax.
        shared_width: width of the experts that every token goes through, together; 0 where there are none.
        latent_size: width of the space that routed experts work in, between two projections; 0 is the hidden size.
        shared_gate: the output of those is multiplied by the sigmoid of one logit a token.
    """

    num_experts: int
    top_k: int
    width: int
    normalize: bool
    layers: frozenset[int]
    float32_weights: bool = False
    jitter: float = 0.0
    activation: GatedActivation | Ungated | None = None
    bias: bool = False
    router_bias: bool = False
    softmax_over_chosen: bool = False
    groups: GroupSpec | None = None
    shared_width: int = 0
    latent_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True, slots=True)
class MambaSpec:
    """Shape of Mamba-2 layers.

    Attributes:
        num_heads, head_dim: H and P; their product is the width that the state space works in.
        groups: G, sets of heads that share the inputs and outputs of their states.
        state_size: N.
        conv_kernel: tokens that the convolution sees.
        chunk_size: tokens that the scan computes at once.
        time_step_min, time_step_max, time_step_floor: time steps are at least the first; fresh ones spread from it to
            the second, and are at least the third.
        bias, conv_bias: of the projections and of the convolution.
    """

    num_heads: int
    head_dim: int
    groups: int
    state_size: int
    conv_kernel: int
    chunk_size: int
    time_step_min: float
    time_step_max: float
    time_step_floor: float
    bias: bool
    conv_bias: bool

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Channels of the convolution: values, and inputs and outputs of the states."""
        return self.inner + 2 * self.groups * self.state_size


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Shape of a decoder.

    Attributes:
        num_heads, num_kv_heads, head_dim: H, G and the size of one head.
        qkv_bias, output_bias, mlp_bias: which projections carry a bias.
        qk_norm: RMSNorm over each query and key head before the rotary embedding.
        sinks: each query head has a learned logit that takes a share of the attention and gives nothing for it.
        norm_rounds_last: norms multiply by their weight in FP32 before they round to the dtype of the activations.
        zero_centred_norms: norms hold their weight less 1.
        gated_attention: the output of each head is multiplied by the sigmoid of a gate that is projected with it.
        attention_kinds: full or sliding attention, or another mixer, one entry a layer.
        delta_net: of the layers with linear attention, where they are gated DeltaNet.
        rope: queries and keys are rotated by their position.
        predict_kinds: mixers of the layers that predict one further token.
        latent: None for attention with keys and values of its own.
        moe: None for a dense family.
        mamba: None where no layer is of that kind.
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
    sinks: bool = False
    norm_rounds_last: bool = False
    zero_centred_norms: bool = False
    gated_attention: bool = False
    delta_net: DeltaNetSpec | None = None
    latent: LatentSpec | None = None
    moe: MoeSpec | None = None
    mamba: MambaSpec | None = None
    rope: bool = True
    predict_kinds: tuple[AttentionKind, ...] = ()

    @property
    def scored_dim(self) -> int:
        """Elements of a head's queries and keys."""
        return self.head_dim if self.latent is None else self.latent.nope_dim + self.latent.rope_dim


def decoder_spec(
    config: PreTrainedConfig,
    *,
    attention_kinds: tuple[AttentionKind, ...],
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    sinks: bool = False,
    norm_rounds_last: bool = False,
    zero_centred_norms: bool = False,
    gated_attention: bool = False,
    delta_net: DeltaNetSpec | None = None,
    latent: LatentSpec | None = None,
    moe: MoeSpec | None = None,
) -> DecoderSpec:
    """A `DecoderSpec` whose common part comes from the config fields that all families share."""
    return DecoderSpec(
        hidden_size=config.hidden_size,
        # Families whose layers all have experts have no such field.
        mlp_width=getattr(config, "intermediate_size", None) or 0,
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
        sinks=sinks,
        norm_rounds_last=norm_rounds_last,
        zero_centred_norms=zero_centred_norms,
        gated_attention=gated_attention,
        delta_net=delta_net,
        latent=latent,
        moe=moe,
    )


def uniform_attention(config: PreTrainedConfig) -> tuple[AttentionKind, ...]:
    """The same attention in every layer: sliding where the config has a `sliding_window`."""
    sliding = getattr(config, "sliding_window", None) is not None
    return ("sliding_attention" if sliding else "full_attention",) * config.num_hidden_layers
