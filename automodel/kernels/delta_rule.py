"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464, equation 10): references in torch, and the kernels of
flash-linear-attention behind the same function where it is installed.

The state S [K, V] of a head maps keys to values. Each token t first lets it decay, then corrects what it holds for the
token's key, and is read with the token's query:

    S_t = exp(g_t) S_{t-1} + k_t beta_t (v_t - k_t^T exp(g_t) S_{t-1})        o_t = q_t^T S_t

with k and q of length 1, q scaled by 1 / sqrt(K). Everything is computed in FP32 at least, and the state stays FP32.

Legend: B batch, S sequence, H value heads, K and V sizes of a key and a value, N chunks of C tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from automodel.kernels.packages import is_at_least, is_installed

DeltaRuleKernel = Literal["torch", "fla"]

CHUNK = 64
_NORM_EPS = 1e-6
_FLA_DTYPES = (torch.bfloat16, torch.float16)


def fla_obstacle(device: torch.device, dtype: torch.dtype, *, training: bool) -> str | None:
    """Why flash-linear-attention cannot run the rule on these inputs, with gradients to train; None where it can."""
    if device.type != "cuda":
        return "flash-linear-attention needs CUDA"
    if not is_installed("fla"):
        return "flash-linear-attention is not installed"
    if dtype not in _FLA_DTYPES:
        return f"flash-linear-attention does not take {str(dtype).removeprefix('torch.')}"
    if training and _gradients_are_refused(device.index or 0):
        return "flash-linear-attention has no gradients on Hopper with triton 3.4 to 3.7.0 and without tilelang"
    return None


@torch.compiler.assume_constant_result
def _gradients_are_refused(device: int) -> bool:
    """Whether its backward pass raises an error: these releases of Triton miscompile it there (its issue 640)."""
    miscompiled = is_at_least("triton", 3, 4) and not is_at_least("triton", 3, 7, 1)
    return miscompiled and torch.cuda.get_device_capability(device)[0] == 9 and not is_at_least("tilelang", 0)


def gated_delta_rule(
    query_BSHK: torch.Tensor,
    key_BSHK: torch.Tensor,
    value_BSHV: torch.Tensor,
    decay_BSH: torch.Tensor,
    beta_BSH: torch.Tensor,
    kernel: DeltaRuleKernel,
    *,
    state_BHKV: torch.Tensor | None = None,
    document_BS: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What every token reads, and the state after the last one.

    Args:
        query_BSHK, key_BSHK: of any length; normalised here.
        decay_BSH: g, the logarithm of the decay, at most 0.
        beta_BSH: how far the state is corrected, from 0 to 1.
        kernel: `"torch"` runs anywhere; `"fla"` has the limits that `fla_obstacle` tells.
        state_BHKV: FP32 state before the first token; None is zero.
        document_BS: number of each token's document where rows hold several: states start at zero in each. Excludes
            `state_BHKV`, and the state that is returned is that of each row's last document.

    Returns:
        [B, S, H, V] in the dtype of `value_BSHV`, and the state [B, H, K, V] in FP32 (FP64 for FP64 inputs).
    """
    if kernel == "fla":
        return _fla(query_BSHK, key_BSHK, value_BSHV, decay_BSH, beta_BSH, state_BHKV, document_BS)
    wide = torch.promote_types(value_BSHV.dtype, torch.float32)
    inputs = (query_BSHK, key_BSHK, value_BSHV, decay_BSH, beta_BSH)
    query, key, value, decay, beta = (x.transpose(1, 2).to(wide) for x in inputs)
    query = _unit(query) * query.shape[-1] ** -0.5
    key = _unit(key)
    batch, heads, length, _ = value.shape
    if state_BHKV is None:
        state_BHKV = value.new_zeros(batch, heads, key.shape[-1], value.shape[-1])
    if length == 1:
        output, state = recurrent_delta_rule(query, key, value, decay, beta, state_BHKV.to(wide))
    else:
        output, state = chunked_delta_rule(query, key, value, decay, beta, state_BHKV.to(wide), document_BS)
    return output.transpose(1, 2).to(value_BSHV.dtype), state


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)


def recurrent_delta_rule(
    query_BHSK: torch.Tensor,
    key_BHSK: torch.Tensor,
    value_BHSV: torch.Tensor,
    decay_BHS: torch.Tensor,
    beta_BHS: torch.Tensor,
    state_BHKV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule as it is defined, token by token; queries and keys normalised, all in one dtype."""
    outputs = []
    for t in range(query_BHSK.shape[2]):
        key_BHK1 = key_BHSK[:, :, t, :, None]
        state_BHKV = state_BHKV * decay_BHS[:, :, t, None, None].exp()
        held_BHV = (key_BHK1 * state_BHKV).sum(2)
        correction_BHV = beta_BHS[:, :, t, None] * (value_BHSV[:, :, t] - held_BHV)
        state_BHKV = state_BHKV + key_BHK1 * correction_BHV[:, :, None]
        outputs.append((query_BHSK[:, :, t, :, None] * state_BHKV).sum(2))
    return torch.stack(outputs, dim=2), state_BHKV


def chunked_delta_rule(
    query_BHSK: torch.Tensor,
    key_BHSK: torch.Tensor,
    value_BHSV: torch.Tensor,
    decay_BHS: torch.Tensor,
    beta_BHS: torch.Tensor,
    state_BHKV: torch.Tensor,
    document_BS: torch.Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by chunks: matrix products within each, one step of the recurrence from one to the next.

    Within a chunk the corrections u depend on one another by a triangular system (arXiv 2406.06484, equations 10, 11):
    with G the sums of g in the chunk and D_ij = exp(G_i - G_j) for j <= i,

        (I + A) u = beta (v - exp(G) k S)        A_ij = beta_i D_ij k_i^T k_j for j < i.
    """
    length = query_BHSK.shape[2]
    chunk = min(chunk, length)
    # Padding has key and beta 0 and no decay: it changes no state.
    padded = -length % chunk
    query, key, value = (
        F.pad(x, (0, 0, 0, padded)).unflatten(2, (-1, chunk)) for x in (query_BHSK, key_BHSK, value_BHSV)
    )
    decay, beta = (F.pad(x, (0, padded)).unflatten(2, (-1, chunk)) for x in (decay_BHS, beta_BHS))
    total = decay.cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu(1)
    pairwise = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    from_start, to_end = total.exp(), (total[..., -1:] - total).exp()
    kept_BHN = from_start[..., -1]
    if document_BS is not None:
        same, starts, ends, whole = _within_documents(document_BS, padded, chunk)
        pairwise, from_start = pairwise * same, from_start * starts
        to_end, kept_BHN = to_end * ends, kept_BHN * whole

    scaled_key = key * beta.unsqueeze(-1)
    system = (scaled_key @ key.mT) * pairwise
    right = torch.cat((value * beta.unsqueeze(-1), scaled_key * from_start.unsqueeze(-1)), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    free, by_state = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    attention = (query @ key.mT) * pairwise
    query, key = query * from_start.unsqueeze(-1), key * to_end.unsqueeze(-1)

    outputs = []
    for n in range(query.shape[2]):
        correction = free[:, :, n] - by_state[:, :, n] @ state_BHKV
        outputs.append(query[:, :, n] @ state_BHKV + attention[:, :, n] @ correction)
        state_BHKV = state_BHKV * kept_BHN[:, :, n, None, None] + key[:, :, n].mT @ correction
    return torch.cat(outputs, dim=2)[:, :, :length], state_BHKV


def _within_documents(
    document_BS: torch.Tensor, padded: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which decays reach: between two tokens of a chunk, from its start, to its end, and from its start to its end.

    Shapes [B, 1, N, C, C], twice [B, 1, N, C], and [B, 1, N].
    """
    last = document_BS[:, -1:]
    document_BNC = torch.cat((document_BS, last.expand(-1, padded)), dim=1).unflatten(1, (-1, chunk))
    end_BN = document_BNC[..., -1]
    before_BN = torch.cat((document_BNC[:, :1, 0], end_BN[:, :-1]), dim=1)
    same = document_BNC.unsqueeze(-1) == document_BNC.unsqueeze(-2)
    starts, ends = document_BNC == before_BN.unsqueeze(-1), document_BNC == end_BN.unsqueeze(-1)
    return same.unsqueeze(1), starts.unsqueeze(1), ends.unsqueeze(1), (before_BN == end_BN).unsqueeze(1)


@torch.compiler.disable
def _fla(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    document_BS: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    batch, length = value.shape[:2]
    if document_BS is None:
        rule = fused_recurrent_gated_delta_rule if length == 1 else chunk_gated_delta_rule
        return rule(query, key, value, g=decay, beta=beta, **options)
    starts = F.pad(document_BS.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero().flatten()
    options["cu_seqlens"] = F.pad(starts, (0, 1), value=batch * length)
    rows = (x.flatten(0, 1).unsqueeze(0) for x in (query, key, value))
    output, states = chunk_gated_delta_rule(
        *rows, g=decay.flatten(0, 1).unsqueeze(0), beta=beta.flatten(0, 1).unsqueeze(0), **options
    )
    last = F.pad(starts % length == 0, (0, 1), value=True)[1:]
    return output.view_as(value), states[last]
