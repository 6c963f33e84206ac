"""What softmax attention is told about who sees whom: nothing, spans of tokens, or a mask."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from automodel.attention_backends import resolve_spans
from automodel.backends import Backend
from automodel.compat import PreTrainedConfig, attention_mask_for
from automodel.kernels.flash import Spans, document_starts
from automodel.models.spec import DecoderSpec

AttentionMask = torch.Tensor | Spans | None


def is_packed(position_ids_BS: torch.Tensor | None, attention_mask: object, cache: Cache | None) -> bool:
    """Whether rows hold packed documents: positions do not count up by one, and no mask or cache says why."""
    if position_ids_BS is None or attention_mask is not None or cache is not None:
        return False
    return bool((position_ids_BS.diff(dim=-1) != 1).any())


def sees_whole_rows(x_BSD: torch.Tensor, mask: AttentionMask, kernel: str, cache: Cache | None) -> bool:
    """Whether tokens see all before them in their row and nothing else, so that no mask is needed to say so."""
    return kernel != "eager" and mask is None and cache is None and x_BSD.shape[1] > 1


def attention_masks(
    config: PreTrainedConfig,
    spec: DecoderSpec,
    backend: Backend,
    x_BSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cache: Cache | None,
    packed_BS: torch.Tensor | None,
    cache_position: torch.Tensor,
    training: bool,
) -> dict[str, AttentionMask]:
    """The mask of each kind of layer with softmax attention.

    Args:
        x_BSD: input embeddings.
        attention_mask: [B, keys] with 0 at padding, a prepared mask, or None.
        packed_BS: positions of rows that hold packed documents, None of others.
        training: attention drops out what its config says.
    """
    rows, length = x_BSD.shape[:2]
    spans = None
    if config._attn_implementation == "sdpa" and attention_mask is None and cache is None and length > 1:
        drops = training and spec.attention_dropout > 0
        spans = None if drops else resolve_spans(backend, x_BSD.device, x_BSD.dtype, spec.scored_dim).kernel
    documents: tuple[torch.Tensor | None, int] = (None, length)
    if packed_BS is not None and spans not in (None, "mask"):
        documents = document_starts(packed_BS.expand(rows, -1))
    masks: dict[str, AttentionMask] = {}
    for kind in set(spec.attention_kinds) & {"full_attention", "sliding_attention"}:
        sliding = kind == "sliding_attention"
        window = config.sliding_window if sliding and length > config.sliding_window else 0
        if spans not in (None, "mask") and (packed_BS is not None or window):
            masks[kind] = Spans(*documents, window, spans)
            continue
        masks[kind] = attention_mask_for(
            config,
            x_BSD,
            attention_mask,
            past_key_values=cache,
            position_ids=packed_BS,
            cache_position=cache_position,
            sliding=sliding,
        )
    return masks
