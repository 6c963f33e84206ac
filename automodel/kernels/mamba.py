"""The two operations of a Mamba-2 layer (arXiv 2405.21060): a causal convolution of each channel, and the scan of its
state space in the chunked form of section 6. References in torch, with the installed fused kernels beside them.

Tokens of different segments (documents packed in one row) do not see one another.

Legend: B batch, S sequence, C channels, W kernel width, H heads, P head_dim, G groups of heads that share their inputs
and outputs of the state, R = H / G, N state size, K chunks, L chunk length (position l reads what came in at s).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from automodel.kernels.packages import is_installed

MambaKernel = Literal["torch", "fused"]

_PACKAGES = ("mamba_ssm", "causal_conv1d")
_FUSED_DTYPES = (torch.bfloat16, torch.float16)
_CHANNEL_MULTIPLE = 8
_FUSED_WIDTHS = (2, 3, 4)


def fused_mamba_obstacle(device: torch.device, dtype: torch.dtype, channels: int, width: int) -> str | None:
    """Why the kernels of mamba_ssm and causal_conv1d cannot run, or None when they can.

    Args:
        device: of the parameters.
        dtype: of the activations; FP32 keeps the reference, which computes in FP32 throughout.
        channels: C, of the convolution.
        width: W.
    """
    if device.type != "cuda":
        return f"the fused kernels do not run on {device.type}"
    if missing := [name for name in _PACKAGES if not is_installed(name)]:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    if dtype not in _FUSED_DTYPES:
        return f"the fused kernels do not take {str(dtype).removeprefix('torch.')}"
    if channels % _CHANNEL_MULTIPLE:
        return f"causal_conv1d needs channels in multiples of {_CHANNEL_MULTIPLE}; there are {channels}"
    if width not in _FUSED_WIDTHS:
        return f"causal_conv1d has no kernel of width {width}"
    return None


def causal_conv(
    x_BSC: torch.Tensor,
    weight_CW: torch.Tensor,
    bias_C: torch.Tensor | None,
    kernel: MambaKernel,
    segment_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(bias + sum over j of weight[:, W - 1 - j] * x[s - j]), where x before the segment of s is zero: [B, S, C].

    Args:
        x_BSC: in the dtype of the weight.
        kernel: `"torch"` runs anywhere; `"fused"` has the limits that `fused_mamba_obstacle` tells.
        segment_BS: integer that changes where another segment begins; None means that a row is one segment.
    """
    if kernel == "fused":
        return _fused_conv(x_BSC, weight_CW, bias_C, segment_BS)
    channels, width = weight_CW.shape
    if segment_BS is None:
        x_BCS = F.pad(x_BSC.transpose(1, 2), (width - 1, 0))
        return F.silu(F.conv1d(x_BCS, weight_CW.unsqueeze(1), bias_C, groups=channels)).transpose(1, 2)
    y_BSC = x_BSC * weight_CW[:, -1] if bias_C is None else torch.addcmul(bias_C, x_BSC, weight_CW[:, -1])
    for lag in range(1, min(width, x_BSC.shape[1])):
        same = segment_BS[:, lag:] == segment_BS[:, :-lag]
        y_BSC = y_BSC + F.pad(x_BSC[:, :-lag] * weight_CW[:, -1 - lag] * same.unsqueeze(-1), (0, 0, lag, 0))
    return F.silu(y_BSC)


@torch.compiler.disable
def _fused_conv(
    x_BSC: torch.Tensor, weight_CW: torch.Tensor, bias_C: torch.Tensor | None, segment_BS: torch.Tensor | None
) -> torch.Tensor:
    from causal_conv1d import causal_conv1d_fn

    segment_BS = None if segment_BS is None else segment_BS.int()
    # Channels last in memory, which the kernel needs to know of segments.
    x_BCS = x_BSC.contiguous().transpose(1, 2)
    y_BCS = causal_conv1d_fn(x_BCS, weight_CW, bias_C, seq_idx=segment_BS, activation="silu")
    return y_BCS.transpose(1, 2)


def state_space_scan(
    x_BSHP: torch.Tensor,
    step_BSH: torch.Tensor,
    A_H: torch.Tensor,
    B_BSGN: torch.Tensor,
    C_BSGN: torch.Tensor,
    D_H: torch.Tensor,
    chunk_size: int,
    kernel: MambaKernel,
    *,
    initial_BHPN: torch.Tensor | None = None,
    segment_BS: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y[t] = C[t] . state[t] + D x[t], where state[t] = exp(step[t] A) state[t - 1] + step[t] x[t] B[t]^T.

    Args:
        x_BSHP: values.
        step_BSH: positive time steps, in FP32 or wider.
        A_H: negative rates of decay; D_H: skip connection; both in FP32 or wider.
        B_BSGN, C_BSGN: inputs to and outputs from the state, shared by the heads of a group.
        chunk_size: tokens computed as one product of matrices; between chunks only the state goes on.
        kernel: `"torch"` computes in the dtype of `step_BSH`; `"fused"` has the limits of `fused_mamba_obstacle`.
        initial_BHPN: state before the first token; it goes on into the first segment. None is zero.
        segment_BS: integer that changes where the state starts over from zero.

    Returns:
        [B, S, H, P], in FP32 or wider from the reference, and the state after the last token [B, H, P, N].
    """
    if kernel == "fused":
        return _fused_scan(x_BSHP, step_BSH, A_H, B_BSGN, C_BSGN, D_H, chunk_size, initial_BHPN, segment_BS)
    batch, length, heads, head_dim = x_BSHP.shape
    groups, chunk = B_BSGN.shape[2], min(chunk_size, length)
    wide = step_BSH.dtype

    def chunks(tensor: torch.Tensor) -> torch.Tensor:
        """[B, S, H or G, *] -> [B, K, G, R or 1, L, *], with zeros for tokens beyond the last."""
        padded = F.pad(tensor.to(wide), (0, 0) * (tensor.ndim - 2) + (0, -length % chunk))
        return padded.unflatten(1, (-1, chunk)).unflatten(3, (groups, -1)).movedim(2, 4)

    input_BKGRLP = chunks(x_BSHP * step_BSH.unsqueeze(-1))
    rate_BKGRL = chunks(step_BSH * A_H)
    in_BKGRLN, out_BKGRLN = chunks(B_BSGN), chunks(C_BSGN)
    visible_BKLL, entered_BKL = _reach(segment_BS, batch, length, chunk, x_BSHP.device)

    # What is left at l of what came in at s: exp of the rates between. Summed from s on, and not a difference of sums
    # from the chunk's beginning, whose rounding one strong decay would make large.
    between = rate_BKGRL.unsqueeze(-1).expand(*rate_BKGRL.shape, chunk)
    between = between.masked_fill(~_lower(chunk, -1, x_BSHP.device), 0).cumsum(-2)
    left_BKGRLL = between.masked_fill(~visible_BKLL[:, :, None, None], -torch.inf).exp()
    since_start_BKGRL = rate_BKGRL.cumsum(-1).masked_fill(~entered_BKL[:, :, None, None], -torch.inf).exp()

    y_BKGRLP = (out_BKGRLN @ in_BKGRLN.transpose(-1, -2) * left_BKGRLL) @ input_BKGRLP
    added_BKGRPN = (input_BKGRLP * left_BKGRLL[..., -1, :, None]).transpose(-1, -2) @ in_BKGRLN
    state_BGRPN = torch.zeros_like(added_BKGRPN[:, 0]) if initial_BHPN is None else initial_BHPN.to(wide)
    state_BGRPN = state_BGRPN.reshape(added_BKGRPN[:, 0].shape)
    before = []
    for added, kept in zip(added_BKGRPN.unbind(1), since_start_BKGRL[..., -1, None, None].unbind(1), strict=True):
        before.append(state_BGRPN)
        state_BGRPN = kept * state_BGRPN + added
    from_before = out_BKGRLN @ torch.stack(before, 1).transpose(-1, -2)
    y_BKGRLP = y_BKGRLP + from_before * since_start_BKGRL.unsqueeze(-1)
    y_BSHP = y_BKGRLP.movedim(4, 2).flatten(3, 4).flatten(1, 2)[:, :length]
    return y_BSHP + D_H.to(wide).unsqueeze(-1) * x_BSHP, state_BGRPN.reshape(batch, heads, head_dim, -1)


@torch.compiler.disable
def _fused_scan(
    x_BSHP: torch.Tensor,
    step_BSH: torch.Tensor,
    A_H: torch.Tensor,
    B_BSGN: torch.Tensor,
    C_BSGN: torch.Tensor,
    D_H: torch.Tensor,
    chunk_size: int,
    initial_BHPN: torch.Tensor | None,
    segment_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(
        x_BSHP,
        step_BSH,
        A_H,
        B_BSGN,
        C_BSGN,
        chunk_size,
        D=D_H,
        initial_states=initial_BHPN,
        seq_idx=None if segment_BS is None else segment_BS.int(),
        return_final_states=True,
    )


def _reach(
    segment_BS: torch.Tensor | None, batch: int, length: int, chunk: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens s of its chunk a token l sees [B, K, L, L], and whether it sees those before the chunk [B, K, L]."""
    count = -(-length // chunk)
    lower_LL = _lower(chunk, 0, device)
    if segment_BS is None:
        return lower_LL.expand(batch, count, chunk, chunk), lower_LL.new_ones(()).expand(batch, count, chunk)
    beyond = segment_BS[:, -1:].expand(-1, count * chunk - length)
    segment_BKL = torch.cat((segment_BS, beyond), dim=1).unflatten(1, (count, chunk))
    # The segment that was going on before each chunk; the initial state belongs to the first.
    going_on_BK = torch.cat((segment_BKL[:, :1, 0], segment_BKL[:, :-1, -1]), dim=1)
    visible_BKLL = lower_LL & (segment_BKL.unsqueeze(-1) == segment_BKL.unsqueeze(-2))
    return visible_BKLL, segment_BKL == going_on_BK.unsqueeze(-1)


def _lower(size: int, diagonal: int, device: torch.device) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(diagonal)
