"""Multi-head latent attention (DeepSeek V2, arXiv 2405.04434, section 2.1): keys and values of all heads are made from
one narrow latent vector a token, and that vector is what the cache holds.

Legend: B batch, S sequence, D hidden, H heads, L width of the latent, T keys attended to; a head has n dimensions
without position, r with rotary position (shared by the keys of all heads), and v of values.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from automodel.attention_backends import resolve_sdpa
from automodel.backends import Backend
from automodel.compat import update_cache
from automodel.kernels.flash import Spans, causal_attention
from automodel.kernels.sdpa import cudnn_first
from automodel.models.linear import Linear
from automodel.models.masking import AttentionMask, sees_whole_rows
from automodel.models.norms import RMSNorm
from automodel.models.rope import rotate
from automodel.models.spec import DecoderSpec, LatentSpec

_LATENT_NORM_EPS = 1e-6
"""Whatever the config's `rms_norm_eps`, in DeepSeek's own code and in transformers."""


class LatentAttention(nn.Module):
    """Latent attention of one layer.

    Args:
        spec: shape of the decoder.
        latent: what is particular to this attention.
        layer: index of the layer in the cache.
        backend: for the attention, and the norms of the latents.
    """

    def __init__(self, spec: DecoderSpec, latent: LatentSpec, layer: int, backend: Backend) -> None:
        super().__init__()
        self.layer = layer
        self.backend = backend
        self.latent = latent
        self.dropout = spec.attention_dropout
        hidden, heads, rank = spec.hidden_size, spec.num_heads, latent.rank
        query_width = heads * (latent.nope_dim + latent.rope_dim)
        if latent.query_rank is None:
            self.q_proj = Linear(hidden, query_width, backend)
        else:
            self.q_a_proj = Linear(hidden, latent.query_rank, backend, bias=latent.bias)
            self.q_a_layernorm = RMSNorm(latent.query_rank, _LATENT_NORM_EPS, backend)
            self.q_b_proj = Linear(latent.query_rank, query_width, backend)
        self.kv_a_proj_with_mqa = Linear(hidden, rank + latent.rope_dim, backend, bias=latent.bias)
        self.kv_a_layernorm = RMSNorm(rank, _LATENT_NORM_EPS, backend)
        self.kv_b_proj = Linear(rank, heads * (latent.nope_dim + latent.value_dim), backend)
        self.o_proj = Linear(heads * latent.value_dim, hidden, backend, bias=latent.bias)

    def forward(
        self,
        x_BSD: torch.Tensor,
        cos_BSr: torch.Tensor,
        sin_BSr: torch.Tensor,
        mask: AttentionMask,
        kernel: str,
        cache: Cache | None,
        cache_position: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention output [B, S, D], and the probabilities [B, H, S, T] when `kernel` is `"eager"`.

        Args:
            cos_BSr, sin_BSr: rotary tables; their batch may be 1.
            mask: as `masking.attention_masks` makes it for `kernel`.
            kernel: `"sdpa"` or `"eager"`.
            cache: latents [B, 1, T, L] as keys and rotary keys [B, 1, T, r] as values, extended in place.
            cache_position: [S], index of each query token in the cache.
        """
        latent = self.latent
        cos, sin = cos_BSr.unsqueeze(1), sin_BSr.unsqueeze(1)
        nope_BHSn, rope_BHSr = self._queries(x_BSD).split((latent.nope_dim, latent.rope_dim), dim=-1)
        latent_BSL, rope_BSr = self.kv_a_proj_with_mqa(x_BSD).split((latent.rank, latent.rope_dim), dim=-1)
        latent_B1TL = self.kv_a_layernorm(latent_BSL).unsqueeze(1)
        rope_B1Tr = self._rotate(rope_BSr.unsqueeze(1), cos, sin)
        query_BHSd = torch.cat((nope_BHSn, self._rotate(rope_BHSr, cos, sin)), dim=-1)
        if cache is not None:
            latent_B1TL, rope_B1Tr = update_cache(cache, latent_B1TL, rope_B1Tr, self.layer, cache_position)
        key_BHTd, value_BHTv = self._keys_and_values(latent_B1TL, rope_B1Tr)

        dropout = self.dropout if self.training else 0.0
        resolved = resolve_sdpa(self.backend, x_BSD.device, x_BSD.dtype, query_BHSd.shape[-1]).kernel
        if resolved == "te" and dropout == 0 and sees_whole_rows(x_BSD, mask, kernel, cache):
            mask = Spans(None, x_BSD.shape[1], 0, "te")
        if isinstance(mask, Spans):
            # Kernels want values as long as keys; what is added is zero and cut off again.
            padded_BHSd = F.pad(value_BHTv, (0, query_BHSd.shape[-1] - latent.value_dim))
            heads = (states.transpose(1, 2) for states in (query_BHSd, key_BHTd, padded_BHSd))
            output_BSHd = causal_attention(*heads, mask, scale=latent.scale)
            return self.o_proj(output_BSHd[..., : latent.value_dim].flatten(2, 3)), None
        attend = _eager if kernel == "eager" else _sdpa
        if resolved in ("cudnn", "flash4"):
            attend = partial(cudnn_first, attend)
        output_BHSv, probabilities = attend(query_BHSd, key_BHTd, value_BHTv, mask, dropout, latent.scale)
        return self.o_proj(output_BHSv.transpose(1, 2).flatten(2, 3)), probabilities

    def _queries(self, x_BSD: torch.Tensor) -> torch.Tensor:
        if self.latent.query_rank is None:
            query = self.q_proj(x_BSD)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        return query.unflatten(-1, (-1, self.latent.nope_dim + self.latent.rope_dim)).transpose(1, 2)

    def _keys_and_values(self, latent_B1TL: torch.Tensor, rope_B1Tr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, H, T, n + r] and [B, H, T, v], the rotary part being the same in every head."""
        latent = self.latent
        expanded = self.kv_b_proj(latent_B1TL.squeeze(1)).unflatten(-1, (-1, latent.nope_dim + latent.value_dim))
        nope_BHTn, value_BHTv = expanded.transpose(1, 2).split((latent.nope_dim, latent.value_dim), dim=-1)
        rope_BHTr = rope_B1Tr.expand(-1, nope_BHTn.shape[1], -1, -1)
        return torch.cat((nope_BHTn, rope_BHTr), dim=-1), value_BHTv

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if self.latent.interleaved:
            # Queries and keys change order alike, which their products do not notice.
            x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
        return rotate(x, cos, sin)


def _sdpa(
    query_BHSd: torch.Tensor,
    key_BHTd: torch.Tensor,
    value_BHTv: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float,
) -> tuple[torch.Tensor, None]:
    length = query_BHSd.shape[2]
    causal = mask is None and length > 1
    if causal and key_BHTd.shape[2] > length:
        # Prefill into an empty cache of fixed size: what lies beyond the queries is not filled yet.
        key_BHTd, value_BHTv = key_BHTd[:, :, :length], value_BHTv[:, :, :length]
    output = F.scaled_dot_product_attention(
        query_BHSd, key_BHTd, value_BHTv, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
    )
    return output, None


def _eager(
    query_BHSd: torch.Tensor,
    key_BHTd: torch.Tensor,
    value_BHTv: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = query_BHSd @ key_BHTd.transpose(2, 3) * scale
    if mask is not None:
        scores = scores + mask[..., : key_BHTd.shape[2]]
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query_BHSd.dtype)
    return F.dropout(probabilities, dropout) @ value_BHTv, probabilities
