"""A Mamba-2 layer (arXiv 2405.21060): projections around a causal convolution and the scan of a state space.

Legend: B batch, S sequence, D hidden, I inner width, C channels of the convolution, H heads, P head_dim (I = H * P),
G groups, N state size, W kernel width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from automodel.backends import Backend
from automodel.kernels.mamba import MambaKernel, causal_conv, state_space_scan
from automodel.models.linear import Linear
from automodel.models.spec import DecoderSpec, MambaSpec
from automodel.precision import keep_float32, uncompiled
from automodel.scan_backends import resolve_mamba


@dataclass(frozen=True, slots=True)
class RecurrentMask:
    """What a layer that scans has to know of its tokens.

    Attributes:
        padding_BS: 0 at padding, which neither enters the state nor the convolution; None where there is none.
        segment_BS: number of the document of each token; None where a row is one document.
    """

    padding_BS: torch.Tensor | None = None
    segment_BS: torch.Tensor | None = None


class StateSpace(nn.Module):
    """Decay, skip and time-step bias of each head; FP32 whatever the model is cast to, and computed so.

    A module of its own, so that FSDP2 can gather these parameters without the cast that mixed precision asks for.
    """

    keeps_float32 = True

    def __init__(self, mamba: MambaSpec) -> None:
        super().__init__()
        self.mamba = mamba
        for name in ("A_log", "D", "dt_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(mamba.num_heads, dtype=torch.float32)))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StateSpace:
        return super()._apply(keep_float32(fn), recurse)

    def forward(self, x_BSH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Time steps [B, S, H] made of `x_BSH`; A [H], negative; D [H]: all in FP32."""
        step_BSH = F.softplus(x_BSH.float() + self.dt_bias).clamp(min=self.mamba.time_step_min)
        # Nothing but copies: FSDP2 may free the gathered parameters when this returns.
        return step_BSH, -self.A_log.exp(), self.D.clone()

    def fresh_values(self, name: str, generator: torch.Generator | None = None) -> torch.Tensor:
        """[H] in FP32, as in transformers: A = -1 .. -H, D = 1, and a bias for time steps log-uniform in the range."""
        mamba, heads = self.mamba, self.mamba.num_heads
        if name == "A_log":
            return torch.arange(1, heads + 1, dtype=torch.float32).log()
        if name == "D":
            return torch.ones(heads)
        low, high = math.log(mamba.time_step_min), math.log(mamba.time_step_max)
        step = torch.rand(heads, generator=generator).mul(high - low).add(low).exp().clamp(min=mamba.time_step_floor)
        # The inverse of softplus.
        return step + torch.log(-torch.expm1(-step))


class GatedGroupNorm(nn.Module):
    """RMSNorm over each group of y * silu(gate), times a weight; in FP32 whatever the dtypes are."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, y_BSI: torch.Tensor, gate_BSI: torch.Tensor) -> torch.Tensor:
        """[B, S, I] in the dtype of `gate_BSI`."""
        gated = (y_BSI.float() * F.silu(gate_BSI.float())).unflatten(-1, (self.groups, -1))
        gated = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * gated.flatten(-2)).to(gate_BSI.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, groups={self.groups}, eps={self.eps}"


class Mamba2(nn.Module):
    """The mixer of one layer.

    Time steps are at least `time_step_min`, as in transformers 5; with a cache too, where transformers 5.23 forgets it.

    Args:
        spec: shape of the decoder.
        mamba: what is particular to this mixer.
        layer: index of the layer in the cache.
        backend: kernels.
    """

    def __init__(self, spec: DecoderSpec, mamba: MambaSpec, layer: int, backend: Backend) -> None:
        super().__init__()
        self.mamba = mamba
        self.layer = layer
        self.backend = backend
        projected = mamba.inner + mamba.convolved + mamba.num_heads
        self.in_proj = Linear(spec.hidden_size, projected, backend, bias=mamba.bias)
        self.conv1d = nn.Conv1d(
            mamba.convolved, mamba.convolved, mamba.conv_kernel, groups=mamba.convolved, bias=mamba.conv_bias
        )
        self.ssm = StateSpace(mamba)
        self.norm = GatedGroupNorm(mamba.inner, mamba.groups, spec.norm_eps)
        self.out_proj = Linear(mamba.inner, spec.hidden_size, backend, bias=mamba.bias)

    def forward(self, x_BSD: torch.Tensor, mask: RecurrentMask, cache: Cache | None) -> torch.Tensor:
        """[B, S, D]. A cache holds the last W inputs of the convolution and the state [B, H, P, N]; both go on."""
        mamba, padding_BS = self.mamba, mask.padding_BS
        kernel = self._kernel(x_BSD.device, x_BSD.dtype)
        parts = self.in_proj(x_BSD).split((mamba.inner, mamba.convolved, mamba.num_heads), dim=-1)
        gate_BSI, x_BSC, step_BSH = parts[0], _without(padding_BS, parts[1]), parts[2]
        state = None if cache is None else cache.get_recurrent_state(self.layer)
        weight_CW = self.conv1d.weight.squeeze(1)
        length = x_BSD.shape[1]
        past_BSC = self._with_past(x_BSC, cache)
        # Packed rows have no past: what is before them there is padding.
        past_BSC = past_BSC if mask.segment_BS is None else past_BSC[:, -length:]
        x_BSC = causal_conv(past_BSC, weight_CW, self.conv1d.bias, kernel, mask.segment_BS)
        x_BSC = _without(padding_BS, x_BSC[:, -length:])

        rates = mamba.groups * mamba.state_size
        x_BSI, in_BSr, out_BSr = x_BSC.split((mamba.inner, rates, rates), dim=-1)
        step_BSH, A_H, D_H = uncompiled(self.ssm, step_BSH)
        y_BSHP, state = state_space_scan(
            x_BSI.unflatten(-1, (mamba.num_heads, mamba.head_dim)),
            step_BSH,
            A_H,
            in_BSr.unflatten(-1, (mamba.groups, mamba.state_size)),
            out_BSr.unflatten(-1, (mamba.groups, mamba.state_size)),
            D_H,
            mamba.chunk_size,
            kernel,
            initial_BHPN=state,
            segment_BS=mask.segment_BS,
        )
        if cache is not None:
            cache.update_recurrent_state(state.float(), self.layer)
        return self.out_proj(self.norm(y_BSHP.flatten(-2), gate_BSI))

    def has_kernels(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `layer.Scanning`."""
        return self._kernel(device, dtype) == "fused"

    def _kernel(self, device: torch.device, dtype: torch.dtype) -> MambaKernel:
        return resolve_mamba(self.backend, device, dtype, self.mamba.convolved, self.mamba.conv_kernel).kernel

    def _with_past(self, x_BSC: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """The convolution's inputs after those that the cache holds, which then holds the last of them."""
        if cache is None:
            return x_BSC
        width = self.mamba.conv_kernel
        return cache.update_conv_state(x_BSC.transpose(1, 2), self.layer, conv_kernel_size=width).transpose(1, 2)


def _without(padding_BS: torch.Tensor | None, x_BSX: torch.Tensor) -> torch.Tensor:
    return x_BSX if padding_BS is None else x_BSX * padding_BS.unsqueeze(-1).to(x_BSX.dtype)
