"""Rotary position embedding with every rope type of transformers.

Inverse frequencies are a function of the config alone. They are kept in FP32 and computed again whenever the
module moves, so that neither `model.to(torch.bfloat16)` nor meta-device construction can leave wrong values.

Legend: B batch, S sequence, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from automodel.compat import PreTrainedConfig, original_max_positions, rope_frequencies, rope_type


class RotaryEmbedding(nn.Module):
    """Tables of cosines and sines for given positions.

    Args:
        config: a transformers config; its rope type, base and scaling are read in the installed version's spelling.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = rope_type(config)
        self.length_limit = {
            "dynamic": config.max_position_embeddings,
            "longrope": original_max_positions(config),
        }.get(self.rope_type)
        self.register_buffer("inv_freq", None, persistent=False)
        self._set_frequencies(torch.empty(0).device, None)

    def _set_frequencies(self, device: torch.device, scaled_length: int | None) -> None:
        self.scaled_length = scaled_length
        self.inv_freq, self.attention_factor = rope_frequencies(self.config, device, scaled_length)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        self._set_frequencies(self.inv_freq.device, None)
        return self

    def _follow_length(self, seq_len: int) -> None:
        # The frequencies of these types depend on the longest sequence so far; below the limit they start over.
        if seq_len < self.length_limit or (self.rope_type == "longrope" and seq_len == self.length_limit):
            wanted = None
        elif self.rope_type == "longrope":
            wanted = self.length_limit + 1
        else:
            wanted = max(seq_len, self.scaled_length or 0)
        if wanted != self.scaled_length:
            self._set_frequencies(self.inv_freq.device, wanted)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, S, d], computed in FP32 and returned in the dtype of `x`."""
        if self.length_limit is not None:
            self._follow_length(int(position_ids_BS.max()) + 1)
        angles_BSd = position_ids_BS[..., None].float() * self.inv_freq
        angles_BSd = torch.cat((angles_BSd, angles_BSd), dim=-1)
        cos, sin = angles_BSd.cos() * self.attention_factor, angles_BSd.sin() * self.attention_factor
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`x` rotated by tables that broadcast against it; pairs are (i, i + d/2), as in transformers.

    Tables of d dimensions rotate the first d of `x` (`partial_rotary_factor`); the others stay as they are.
    """
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = x.chunk(2, dim=-1)
    rotated = x * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
