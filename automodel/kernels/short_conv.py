"""A causal convolution over a few tokens, a filter for each channel, with SiLU: what DeltaNet layers begin with.

Legend: B batch, S sequence, C channels, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from automodel.kernels.packages import is_installed


def causal_conv1d_obstacle(device: torch.device) -> str | None:
    """Why the causal-conv1d package cannot run here, or None when it can."""
    if device.type != "cuda":
        return "causal-conv1d needs CUDA"
    return None if is_installed("causal_conv1d") else "causal-conv1d is not installed"


def short_conv(
    x_BCS: torch.Tensor,
    weight_CK: torch.Tensor,
    *,
    fused: bool = False,
    document_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(sum over taps k of weight[:, k] * x[:, :, t - (K - 1) + k]), [B, C, S - K + 1].

    Args:
        x_BCS: with K - 1 columns before the first token: those of earlier tokens, or zeros.
        weight_CK: the last tap is the token's own.
        fused: by the causal-conv1d package; see `causal_conv1d_obstacle`.
        document_BS: number of each token's document where rows hold several, without the columns before: taps do not
            reach into another document.
    """
    taps = weight_CK.shape[1]
    if document_BS is not None:
        return F.silu(_within_documents(x_BCS, weight_CK, document_BS))
    if fused:
        return _fused(x_BCS, weight_CK)[..., taps - 1 :]
    return F.silu(F.conv1d(x_BCS, weight_CK.unsqueeze(1), groups=weight_CK.shape[0]))


@torch.compiler.disable
def _fused(x_BCS: torch.Tensor, weight_CK: torch.Tensor) -> torch.Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x_BCS, weight_CK, activation="silu")


def _within_documents(x_BCS: torch.Tensor, weight_CK: torch.Tensor, document_BS: torch.Tensor) -> torch.Tensor:
    taps, length = weight_CK.shape[1], document_BS.shape[1]
    known = F.pad(document_BS, (taps - 1, 0), value=-1)
    out = 0
    for tap in range(taps):
        same_B1S = (known[:, tap : tap + length] == document_BS).unsqueeze(1)
        out = out + weight_CK[:, tap, None] * (x_BCS[..., tap : tap + length] * same_B1S)
    return out
