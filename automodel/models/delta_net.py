"""Gated DeltaNet (arXiv 2412.06464) as Qwen3-Next has it: attention without a softmax, whose memory is a matrix a head.

Projections are grouped by key head: its query, its key, and the values and output gates of the value heads that share
it, so that a shard of the groups is a complete layer over fewer heads.

Legend: B batch, S sequence, D hidden, C channels of the convolution, G key heads, H value heads, K and V sizes of a key
and a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from automodel.backends import Backend
from automodel.compat import extend_conv_columns, load_recurrent_state, save_recurrent_state
from automodel.kernels.delta_rule import DeltaRuleKernel, gated_delta_rule
from automodel.kernels.short_conv import short_conv
from automodel.models.linear import Linear
from automodel.models.norms import GatedRMSNorm
from automodel.models.spec import DecoderSpec, DeltaNetSpec
from automodel.precision import keep_float32, uncompiled
from automodel.scan_backends import resolve_delta_rule, resolve_short_conv


@dataclass(frozen=True, slots=True)
class Documents:
    """Rows that hold several documents.

    Attributes:
        number_BS: of each token's document, counting up along a row.
    """

    number_BS: torch.Tensor

    @classmethod
    def of(cls, position_ids_BS: torch.Tensor) -> Documents:
        """A document begins wherever a position does not follow the one before it."""
        return cls(document_numbers(position_ids_BS))


def document_numbers(position_ids_BS: torch.Tensor) -> torch.Tensor:
    """The number of each token's document in its row, [B, S]; positions restart where one begins."""
    return F.pad(position_ids_BS.diff(dim=-1) != 1, (1, 0)).cumsum(-1)


class Decay(nn.Module):
    """g = -exp(A_log) softplus(a + dt_bias), in FP32.

    Both parameters stay FP32 whatever the module is cast to: they set how long a head remembers, up to products over
    thousands of tokens, and the repositories of some families have them in FP32.
    """

    keeps_float32 = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.ones(heads, dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Decay:
        return super()._apply(keep_float32(fn), recurse)

    def forward(self, a_BSH: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> the logarithm of each token's decay, FP32 and negative."""
        return -self.A_log.float().exp() * F.softplus(a_BSH.float() + self.dt_bias.float())


class GatedDeltaNet(nn.Module):
    """The token mixer of one layer; it is called as attention is.

    Args:
        spec: shape of the decoder.
        delta: shape of this mixer.
        layer: index of the layer in the cache.
        backend: kernels of the rule and of the convolution.
    """

    def __init__(self, spec: DecoderSpec, delta: DeltaNetSpec, layer: int, backend: Backend) -> None:
        super().__init__()
        self.layer = layer
        self.delta = delta
        self.backend = backend
        keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
        channels = 2 * keys + values
        self.in_proj_qkvz = Linear(spec.hidden_size, 2 * keys + 2 * values, backend)
        self.in_proj_ba = nn.Linear(spec.hidden_size, 2 * delta.value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, delta.conv_kernel, groups=channels, bias=False)
        self.decay = Decay(delta.value_heads)
        self.norm = GatedRMSNorm(delta.value_dim, spec.norm_eps)
        self.out_proj = Linear(values, spec.hidden_size, backend)

    def forward(
        self,
        x_BSD: torch.Tensor,
        cos_BSd: torch.Tensor,  # noqa: ARG002
        sin_BSd: torch.Tensor,  # noqa: ARG002
        mask: torch.Tensor | Documents | None,
        kernel: str,  # noqa: ARG002
        cache: Cache | None,
        cache_position: torch.Tensor,  # noqa: ARG002
    ) -> tuple[torch.Tensor, None]:
        """The output [B, S, D]; there are no attention probabilities.

        Args:
            cos_BSd, sin_BSd, kernel, cache_position: of attention; not used.
            mask: [B, S] with 0 at padding, the documents of packed rows, or None.
            cache: the last columns of the convolution's input and the FP32 states [B, H, K, V], replaced in place.
        """
        delta = self.delta
        document_BS = mask.number_BS if isinstance(mask, Documents) else None
        if isinstance(mask, torch.Tensor):
            x_BSD = x_BSD * mask.unsqueeze(-1).to(x_BSD.dtype)
        query, key, value, gate_BSHV, beta_BSH, a_BSH = self._project(x_BSD)
        state = None if cache is None else load_recurrent_state(cache, self.layer)
        mixed_BSC = torch.cat([x.flatten(2) for x in (query, key, value)], dim=-1)
        mixed_BSC = self._convolve(mixed_BSC, cache, document_BS)
        keys = delta.key_heads * delta.key_dim
        query, key, value = mixed_BSC.split((keys, keys, delta.value_heads * delta.value_dim), dim=-1)
        shared = delta.value_heads // delta.key_heads
        query_BSHK, key_BSHK = (
            x.unflatten(-1, (delta.key_heads, delta.key_dim)).repeat_interleave(shared, dim=2) for x in (query, key)
        )
        value_BSHV = value.unflatten(-1, (delta.value_heads, delta.value_dim))
        output_BSHV, state = gated_delta_rule(
            query_BSHK,
            key_BSHK,
            value_BSHV,
            uncompiled(self.decay, a_BSH),
            beta_BSH,
            self._kernel(x_BSD.device, x_BSD.dtype),
            state_BHKV=state,
            document_BS=document_BS,
        )
        if cache is not None:
            save_recurrent_state(cache, self.layer, state)
        return self.out_proj(self.norm(output_BSHV, gate_BSHV).flatten(2)), None

    def has_kernels(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `layer.Scanning`."""
        return self._kernel(device, dtype) == "fla"

    def _kernel(self, device: torch.device, dtype: torch.dtype) -> DeltaRuleKernel:
        return resolve_delta_rule(self.backend, device, dtype, training=self.training).kernel

    def _project(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries and keys [B, S, G, K], values and gates [B, S, H, V], and beta and a [B, S, H]."""
        delta = self.delta
        shared = delta.value_heads // delta.key_heads
        wide = shared * delta.value_dim
        groups = self.in_proj_qkvz(x_BSD).unflatten(-1, (delta.key_heads, -1))
        query, key, value, gate = groups.split((delta.key_dim, delta.key_dim, wide, wide), dim=-1)
        value, gate = (x.flatten(2).unflatten(-1, (delta.value_heads, delta.value_dim)) for x in (value, gate))
        b, a = self.in_proj_ba(x_BSD).unflatten(-1, (delta.key_heads, -1)).split((shared, shared), dim=-1)
        return query, key, value, gate, b.flatten(2).sigmoid(), a.flatten(2)

    def _convolve(self, mixed_BSC: torch.Tensor, cache: Cache | None, document_BS: torch.Tensor | None) -> torch.Tensor:
        taps = self.delta.conv_kernel
        mixed_BCS = mixed_BSC.transpose(1, 2)
        if cache is None:
            mixed_BCS = F.pad(mixed_BCS, (taps - 1, 0))
        else:
            mixed_BCS = extend_conv_columns(cache, mixed_BCS, self.layer, taps)
        weight_CK = self.conv1d.weight.squeeze(1)
        fused = resolve_short_conv(self.backend, mixed_BSC.device).kernel == "fused"
        return short_conv(mixed_BCS, weight_CK, fused=fused, document_BS=document_BS).transpose(1, 2)
