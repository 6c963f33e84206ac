"""Causal self-attention with one fused projection for queries, keys and values.

The projection's rows are grouped by KV head: its R query heads, then its key head, then its value head, so that a
shard of the groups is a complete attention over fewer heads. Where the output is gated, the gates of a group's heads
come between its queries and its key.

Legend: B batch, S sequence, D hidden, H heads, G kv heads, R = H / G, d head_dim, T keys attended to.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from automodel.attention_backends import resolve_sdpa
from automodel.backends import Backend, resolve_norm
from automodel.compat import update_cache
from automodel.kernels.flash import Spans, causal_attention
from automodel.kernels.heads import fused_heads_obstacle, norm_and_rotate
from automodel.kernels.sdpa import cudnn_first
from automodel.models.linear import Linear
from automodel.models.masking import AttentionMask, sees_whole_rows
from automodel.models.norms import RMSNorm
from automodel.models.rope import rotate
from automodel.models.spec import DecoderSpec

_SINK_DIMS = 8
_CUDNN_HEAD = 128
"""The largest head of cuDNN's kernels forward and backward."""


class Attention(nn.Module):
    """Grouped-query attention of one layer.

    Args:
        spec: shape of the decoder.
        layer: index of the layer in the cache.
        backend: for the attention, and the query and key norms.

    Attributes:
        sinks: [H], a logit for each query head that joins the softmax over its keys and has no value, so that the
            probabilities of the keys sum to less than 1 (GPT-OSS); None in other families.
    """

    def __init__(self, spec: DecoderSpec, layer: int, backend: Backend) -> None:
        super().__init__()
        heads, groups, head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.layer = layer
        self.backend = backend
        self.groups = groups
        self.heads_per_group = heads // groups
        self.head_dim = head_dim
        self.dropout = spec.attention_dropout
        self.gates_per_group = self.heads_per_group if spec.gated_attention else 0
        rows = groups * (self.heads_per_group + self.gates_per_group + 2) * head_dim
        self.qkv_proj = Linear(spec.hidden_size, rows, backend, bias=spec.qkv_bias)
        self.o_proj = Linear(heads * head_dim, spec.hidden_size, backend, bias=spec.output_bias)
        self.register_parameter("sinks", nn.Parameter(torch.zeros(heads)) if spec.sinks else None)
        self.q_norm = _head_norm(spec, backend)
        self.k_norm = _head_norm(spec, backend)

    def forward(
        self,
        x_BSD: torch.Tensor,
        cos_BSd: torch.Tensor | None,
        sin_BSd: torch.Tensor | None,
        mask: AttentionMask,
        kernel: str,
        cache: Cache | None,
        cache_position: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention output [B, S, D], and the probabilities [B, H, S, T] when `kernel` is `"eager"`.

        Args:
            cos_BSd, sin_BSd: rotary tables; their batch may be 1. None: positions are not embedded.
            mask: as `masking.attention_masks` makes it for `kernel`.
            kernel: `"sdpa"` or `"eager"`.
            cache: keys and values of earlier tokens, extended in place.
            cache_position: [S], index of each query token in the cache.
        """
        batch, length, _ = x_BSD.shape
        qkv = self.qkv_proj(x_BSD).view(batch, length, self.groups, -1, self.head_dim)
        query_BSHd, key_BSGd, value_BSGd, gate = self._heads(qkv, cos_BSd, sin_BSd)
        spans = self._spans(x_BSD, mask, kernel, cache)
        if spans is not None:
            output_BSHd = causal_attention(
                query_BSHd, key_BSGd, value_BSGd, spans, scale=self.head_dim**-0.5, sinks_H=self.sinks
            )
            return self._projected(output_BSHd, gate), None
        query_BHSd, key_BGSd, value_BGSd = (heads.transpose(1, 2) for heads in (query_BSHd, key_BSGd, value_BSGd))
        if cache is not None:
            key_BGSd, value_BGSd = update_cache(cache, key_BGSd, value_BGSd, self.layer, cache_position)

        dropout = self.dropout if self.training else 0.0
        attend = _eager if kernel == "eager" else _sdpa
        if self._resolved(x_BSD) == "cudnn":
            attend = partial(cudnn_first, attend)
        output_BHSd, probabilities = attend(query_BHSd, key_BGSd, value_BGSd, mask, dropout, self.sinks)
        return self._projected(output_BHSd.transpose(1, 2), gate), probabilities

    def _heads(
        self, qkv: torch.Tensor, cos_BSd: torch.Tensor | None, sin_BSd: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries, keys and values as attention takes them, and the gates of its output; [B, S, H or G, d].

        Args:
            qkv: the projection, [B, S, G, R + gates + 2, d].
        """
        if cos_BSd is not None and sin_BSd is not None and self._fuses_heads(qkv, cos_BSd):
            q_norm, k_norm = self.q_norm, self.k_norm
            zero_centred, weights = q_norm.zero_centred, (q_norm.weight, k_norm.weight)
            heads = norm_and_rotate(qkv, *weights, cos_BSd, sin_BSd, eps=q_norm.eps, zero_centred=zero_centred)
            return *heads, None
        query, gate, key, value = qkv.split((self.heads_per_group, self.gates_per_group, 1, 1), dim=3)
        query, key = self.q_norm(query), self.k_norm(key)
        if cos_BSd is not None and sin_BSd is not None:
            cos, sin = cos_BSd[:, :, None, None], sin_BSd[:, :, None, None]
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3), gate

    def _fuses_heads(self, qkv: torch.Tensor, cos_BSd: torch.Tensor) -> bool:
        """Whether norms and rotation are one kernel: where there are norms, of the fused kind."""
        if not isinstance(self.q_norm, RMSNorm) or self.gates_per_group:
            return False
        fused = resolve_norm(self.backend, qkv.device, qkv.dtype).kernel == "fused"
        return fused and fused_heads_obstacle(qkv.device, self.head_dim, cos_BSd.shape[-1]) is None

    def _projected(self, output_BSHd: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        output_BSD = output_BSHd.flatten(2, 3)
        if gate is not None and self.gates_per_group:
            output_BSD = output_BSD * gate.flatten(2).sigmoid()
        return self.o_proj(output_BSD)

    def _resolved(self, x_BSD: torch.Tensor) -> str:
        return resolve_sdpa(self.backend, x_BSD.device, x_BSD.dtype, self.head_dim).kernel

    def _spans(self, x_BSD: torch.Tensor, mask: AttentionMask, kernel: str, cache: Cache | None) -> Spans | None:
        """What tokens see, where attention runs without a mask; None where `scaled_dot_product_attention` does it."""
        if isinstance(mask, Spans):
            return mask
        drops = self.training and self.dropout > 0
        if drops or not sees_whole_rows(x_BSD, mask, kernel, cache):
            return None
        resolved = self._resolved(x_BSD)
        with_sinks = resolved == "cudnn" and self.sinks is not None and self.head_dim <= _CUDNN_HEAD
        return Spans(None, x_BSD.shape[1], 0, resolved) if resolved in ("flash4", "te") or with_sinks else None


def _head_norm(spec: DecoderSpec, backend: Backend) -> nn.Module:
    if not spec.qk_norm:
        return nn.Identity()
    return RMSNorm(spec.head_dim, spec.norm_eps, backend, zero_centred=spec.zero_centred_norms)


def _sdpa(
    query_BHSd: torch.Tensor,
    key_BGTd: torch.Tensor,
    value_BGTd: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    sinks_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    length, head_dim = query_BHSd.shape[2:]
    causal = mask is None and length > 1
    if causal and key_BGTd.shape[2] > length:
        # Prefill into an empty cache of fixed size: what lies beyond the queries is not filled yet.
        key_BGTd, value_BGTd = key_BGTd[:, :, :length], value_BGTd[:, :, :length]
    if sinks_H is not None:
        query_BHSd, key_BGTd, value_BGTd, mask = _with_sink_key(
            query_BHSd, key_BGTd, value_BGTd, mask, sinks_H, causal=causal
        )
    if mask is not None:
        # Under a mask, SDPA has grouped heads only in its slowest kernel.
        key_BGTd, value_BGTd = _repeat_heads(key_BGTd, query_BHSd), _repeat_heads(value_BGTd, query_BHSd)
    output = F.scaled_dot_product_attention(
        query_BHSd,
        key_BGTd,
        value_BGTd,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=head_dim**-0.5,
        enable_gqa=mask is None,
    )
    return output[:, :, -length:, :head_dim], None


def _with_sink_key(
    query_BHSd: torch.Tensor,
    key_BGTd: torch.Tensor,
    value_BGTd: torch.Tensor,
    mask: torch.Tensor | None,
    sinks_H: torch.Tensor,
    *,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same attention with a sink, as attention without one over a key more: any SDPA kernel runs it, exactly.

    Heads get a few dimensions more, in which only queries and the new first key are not zero. There their dot product
    is sink * sqrt(d), and after scaling the sink. The new key's value is zero. Where the kernel is to be causal, a
    query goes in front too, so that all others see the new key and themselves.
    """
    head_dim = query_BHSd.shape[-1]
    query = F.pad(query_BHSd, (0, _SINK_DIMS, int(causal), 0))
    query[..., head_dim : head_dim + 2] = sinks_H.to(query.dtype)[:, None, None]
    key, value = (F.pad(states, (0, _SINK_DIMS, 1, 0)) for states in (key_BGTd, value_BGTd))
    # In two parts of 8 bits, which even BF16 holds: heads of 64 need the first alone, sqrt(64) being 8.
    mantissa, exponent = math.frexp(math.sqrt(head_dim))
    coarse = math.ldexp(round(mantissa * 256) / 256, exponent)
    key[:, :, 0, head_dim] = coarse
    key[:, :, 0, head_dim + 1] = math.sqrt(head_dim) - coarse
    if mask is not None:
        mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    return query, key, value, mask


def _eager(
    query_BHSd: torch.Tensor,
    key_BGTd: torch.Tensor,
    value_BGTd: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    sinks_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = _repeat_heads(key_BGTd, query_BHSd), _repeat_heads(value_BGTd, query_BHSd)
    scores = query_BHSd @ key.transpose(2, 3) * query_BHSd.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask[..., : key.shape[2]]
    if sinks_H is not None:
        sink_BHS1 = sinks_H.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink_BHS1], dim=-1)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query_BHSd.dtype)[..., : key.shape[2]]
    return F.dropout(probabilities, dropout) @ value, probabilities


def _repeat_heads(states_BGTd: torch.Tensor, query_BHSd: torch.Tensor) -> torch.Tensor:
    repeats = query_BHSd.shape[1] // states_BGTd.shape[1]
    return states_BGTd.repeat_interleave(repeats, dim=1) if repeats > 1 else states_BGTd
