"""A decoder of layers with one mixer each: Mamba-2, attention, an MLP or experts, as the spec says layer by layer."""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import Cache

from automodel.backends import Backend
from automodel.models.attention import Attention
from automodel.models.decoder import Decoder, hidden_norm
from automodel.models.delta_net import document_numbers
from automodel.models.layer import Layer, LayerOutput
from automodel.models.mamba import Mamba2, RecurrentMask
from automodel.models.masking import AttentionMask, attention_masks, is_packed
from automodel.models.mlp import MoeMLP, PlainMLP
from automodel.models.spec import AttentionKind, DecoderSpec
from ckpt_tools.core.errors import UsageError

Mask = AttentionMask | RecurrentMask


class HybridLayer(Layer):
    """One mixer behind a norm and around a residual."""

    def __init__(self, spec: DecoderSpec, layer: int, backend: Backend) -> None:
        super().__init__(spec.attention_kinds[layer], backend)
        self.norm = hidden_norm(spec, backend)
        self.mixer = mixer(self.kind, spec, layer, backend)

    def _scanning(self) -> Mamba2:
        return self.mixer

    def _run(
        self,
        x_BSD: torch.Tensor,
        cos_BSd: torch.Tensor | None,
        sin_BSd: torch.Tensor | None,
        mask: Mask,
        kernel: str,
        past_key_values: Cache | None,
        cache_position: torch.Tensor | None,
    ) -> LayerOutput:
        probabilities = router_logits = None
        if self.kind == "linear_attention":
            output = self.mixer(self.norm(x_BSD), mask, past_key_values)
        elif self.kind == "full_attention":
            output, probabilities = self._mixed(x_BSD, cos_BSd, sin_BSd, mask, kernel, past_key_values, cache_position)
        else:
            output, router_logits = self.mixer(self.norm(x_BSD))
        return x_BSD + output, probabilities, router_logits

    def _mix(self, x_BSD: torch.Tensor, *inputs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.mixer(self.norm(x_BSD), *inputs)


class HybridPredictLayer(nn.Module):
    """A layer for multi-token prediction, held but not run: a mixer behind its norm, and what joins it to the decoder.

    Args:
        spec: shape of the decoder.
        place: of this layer among those for multi-token prediction.
        backend: kernels.
    """

    def __init__(self, spec: DecoderSpec, place: int, backend: Backend) -> None:
        super().__init__()
        hidden, length = spec.hidden_size, len(spec.predict_kinds)
        within = place % length
        if within == 0:
            self.enorm = hidden_norm(spec, backend)
            self.hnorm = hidden_norm(spec, backend)
            self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.norm = hidden_norm(spec, backend)
        self.mixer = mixer(spec.predict_kinds[within], spec, place, backend)
        if within == length - 1:
            self.final_layernorm = hidden_norm(spec, backend)
        self.requires_grad_(False)


class HybridDecoder(Decoder):
    """The decoder of a hybrid. Packed documents see only themselves, in attention, convolutions and states alike."""

    layer_class = HybridLayer

    def _masks(
        self,
        x_BSD: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
        cache_position: torch.Tensor,
    ) -> dict[str, Mask]:
        none: dict[str, Mask] = dict.fromkeys(self.spec.attention_kinds)
        if isinstance(attention_mask, dict):
            padding_BS = attention_mask["linear_attention"]
            return none | {**attention_mask, "linear_attention": RecurrentMask(padding_BS)}
        packed = is_packed(position_ids, attention_mask, cache)
        masks = attention_masks(
            self.config,
            self.spec,
            self.backend,
            x_BSD,
            attention_mask,
            cache=cache,
            packed_BS=position_ids if packed else None,
            cache_position=cache_position,
            training=self.training,
        )
        segment_BS = document_numbers(position_ids).expand(x_BSD.shape[0], -1) if packed else None
        recurrent = RecurrentMask(_padding(attention_mask, x_BSD.shape[1]), segment_BS)
        return none | masks | {"linear_attention": recurrent}


def mixer(kind: AttentionKind, spec: DecoderSpec, layer: int, backend: Backend) -> nn.Module:
    """The mixer of a layer of some kind."""
    if kind == "linear_attention" and spec.mamba is not None:
        return Mamba2(spec, spec.mamba, layer, backend)
    if kind == "moe" and spec.moe is not None:
        return MoeMLP(spec, spec.moe, backend)
    return PlainMLP(spec, backend) if kind == "mlp" else Attention(spec, layer, backend)


def _padding(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """0 at padding among the tokens of this pass, [B, S]; None where nothing is.

    Raises:
        UsageError: the mask has more dimensions than tokens have, and does not say what is padding.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise UsageError(
            "a layer that scans cannot use a prepared attention mask",
            hint="give attention_mask [batch, keys] with 0 at padding, or position_ids that restart with each document",
        )
    padding_BS = attention_mask[:, -length:]
    return None if length == 1 or bool(padding_BS.all()) else padding_BS
