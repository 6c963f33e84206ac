"""How each attention kernel is called: torch's flash attention, cuDNN (by torch and by TransformerEngine),
FlashAttention-4, and the reference in torch.

All take queries [B, S, H, d], keys and values [B, S, G, d], and return the output [B, S, H, d] and the log-sum-exp of
the scores, FP32 [B, S, H]. Their backward passes take both back, possibly changed to include a sink (see `flash`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

_aten = torch.ops.aten
_Forward = Callable[["Inputs", "Call"], tuple[torch.Tensor, torch.Tensor]]
_Backward = Callable[[torch.Tensor, "Inputs", torch.Tensor, torch.Tensor, "Call"], "Inputs"]


class Inputs(NamedTuple):
    """What attention is computed from, or the gradients of it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Call(NamedTuple):
    """What is not a tensor of the attention; the fields are those of `flash.Spans`, and the scale."""

    starts_N: torch.Tensor | None
    longest: int
    window: int
    scale: float


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """The two directions of a kernel: (inputs, call) -> output and sums; (gradient, inputs, output, sums, call) ->
    gradients of the inputs."""

    forward: _Forward
    backward: _Backward


def _reference(inputs: Inputs, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    scores_BHST, _, value_BHTd = _scores(inputs, call)
    sums_BHS = torch.logsumexp(scores_BHST, -1)
    out_BHSd = torch.exp(scores_BHST - sums_BHS.unsqueeze(-1)) @ value_BHTd
    return out_BHSd.transpose(1, 2).to(inputs.query.dtype), sums_BHS.transpose(1, 2).float()


def _reference_backward(
    grad: torch.Tensor, inputs: Inputs, out: torch.Tensor, sums: torch.Tensor, call: Call
) -> Inputs:
    query, key, _ = inputs
    scores_BHST, key_BHTd, value_BHTd = _scores(inputs, call)
    share_BHST = torch.exp(scores_BHST - sums.transpose(1, 2).unsqueeze(-1))
    grad_BHSd, out_BHSd = (t.transpose(1, 2).to(scores_BHST.dtype) for t in (grad, out))
    grad_value = share_BHST.mT @ grad_BHSd
    spread_BHST = grad_BHSd @ value_BHTd.mT - (grad_BHSd * out_BHSd).sum(-1, keepdim=True)
    grad_scores = share_BHST * spread_BHST * call.scale
    grad_query = grad_scores @ key_BHTd
    grad_key = grad_scores.mT @ query.transpose(1, 2).to(scores_BHST.dtype)
    groups = key.shape[2]
    shared = (g.unflatten(1, (groups, -1)).sum(2).transpose(1, 2).to(key.dtype) for g in (grad_key, grad_value))
    return Inputs(grad_query.transpose(1, 2).to(query.dtype), *shared)


def _scores(inputs: Inputs, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [B, H, S, S] with -inf where nothing is seen, and keys and values by head, at least in FP32."""
    query, key, value = inputs
    wide = torch.promote_types(query.dtype, torch.float32)
    repeats = query.shape[2] // key.shape[2]
    query_BHSd = query.transpose(1, 2).to(wide)
    key_BHTd, value_BHTd = (t.transpose(1, 2).to(wide).repeat_interleave(repeats, dim=1) for t in (key, value))
    rows, length = query.shape[:2]
    at_S = torch.arange(length, device=query.device)
    back_ST = at_S.unsqueeze(1) - at_S
    seen_BST = ((back_ST >= 0) & (back_ST < (call.window or length))).expand(rows, -1, -1)
    if call.starts_N is not None:
        at_BS = torch.arange(rows * length, device=query.device, dtype=torch.int32).view(rows, length)
        document_BS = torch.searchsorted(call.starts_N, at_BS, right=True)
        seen_BST = seen_BST & (document_BS.unsqueeze(2) == document_BS.unsqueeze(1))
    scores = query_BHSd @ key_BHTd.mT * call.scale
    return scores.masked_fill(~seen_BST.unsqueeze(1), -torch.inf), key_BHTd, value_BHTd


def _flash(inputs: Inputs, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    tensors, lengths = _flattened(inputs, call)
    out, sums, *_ = _aten._flash_attention_forward(
        *tensors, *lengths, 0.0, True, False, scale=call.scale, **_torch_window(call)
    )
    return out.view(inputs.query.shape), _sums_by_row(sums, inputs.query, call)


def _flash_backward(grad: torch.Tensor, inputs: Inputs, out: torch.Tensor, sums: torch.Tensor, call: Call) -> Inputs:
    tensors, lengths = _flattened((grad, *inputs, out), call)
    # Without dropout the state of random numbers is not read.
    random, unused = (torch.zeros(n, dtype=torch.uint64, device=grad.device) for n in (2, 0))
    grads = _aten._flash_attention_backward(
        *tensors,
        _sums_by_kernel(sums, call),
        *lengths,
        0.0,
        True,
        random,
        unused,
        scale=call.scale,
        **_torch_window(call),
    )
    return Inputs(*(g.view(t.shape) for g, t in zip(grads, inputs, strict=True)))


def _torch_window(call: Call) -> dict[str, int]:
    return {"window_size_left": call.window - 1, "window_size_right": 0} if call.window else {}


def _cudnn(inputs: Inputs, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, sums, *_ = _aten._scaled_dot_product_cudnn_attention(
        *_by_head(*inputs), None, True, 0.0, True, False, scale=call.scale
    )
    return out.transpose(1, 2), sums.view(sums.shape[:3]).transpose(1, 2)


def _cudnn_backward(grad: torch.Tensor, inputs: Inputs, out: torch.Tensor, sums: torch.Tensor, call: Call) -> Inputs:
    length = inputs.query.shape[1]
    random = torch.zeros((), dtype=torch.int64, device=grad.device)
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        *_by_head(grad, *inputs, out),
        sums.transpose(1, 2).contiguous().unsqueeze(-1),
        random,
        random,
        None,
        None,
        None,
        length,
        length,
        0.0,
        True,
        scale=call.scale,
    )
    return Inputs(*_by_head(*grads))


def _by_head(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def _flash4(inputs: Inputs, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    tensors, _ = _flattened(inputs, call)
    out, sums, *_ = _flash_attn_fwd(*tensors, softmax_scale=call.scale, return_lse=True, **_flash4_options(call))
    return out.view(inputs.query.shape), _sums_by_row(sums, inputs.query, call)


def _flash4_backward(grad: torch.Tensor, inputs: Inputs, out: torch.Tensor, sums: torch.Tensor, call: Call) -> Inputs:
    from flash_attn.cute.interface import _flash_attn_bwd

    (grad, *tensors, out), _ = _flattened((grad, *inputs, out), call)
    grads = _flash_attn_bwd(
        *tensors, out, grad, _sums_by_kernel(sums, call), softmax_scale=call.scale, **_flash4_options(call)
    )
    return Inputs(*(g.view(t.shape) for g, t in zip(grads, inputs, strict=True)))


def _flash4_options(call: Call) -> dict[str, object]:
    options: dict[str, object] = {"causal": True}
    if call.window:
        options |= {"causal": False, "window_size_left": call.window - 1, "window_size_right": 0}
    if call.starts_N is not None:
        options |= {
            "cu_seqlens_q": call.starts_N,
            "cu_seqlens_k": call.starts_N,
            "max_seqlen_q": call.longest,
            "max_seqlen_k": call.longest,
        }
    return options


def _te(inputs: Inputs, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    from transformer_engine.pytorch.cpp_extensions.fused_attn import fused_attn_fwd

    query, key, value = _for_te(inputs, call)
    out, (sums, *_) = fused_attn_fwd(is_training=True, q=query, k=key, v=value, **_te_options(inputs.query, call))
    batch, length, heads, _ = inputs.query.shape
    if call.starts_N is None:
        return out, sums.view(batch, heads, length).transpose(1, 2)
    return out.view(inputs.query.shape), sums.view(batch, length, heads)


def _te_backward(grad: torch.Tensor, inputs: Inputs, out: torch.Tensor, sums: torch.Tensor, call: Call) -> Inputs:
    from transformer_engine.pytorch.cpp_extensions.fused_attn import fused_attn_bwd

    grad, query, key, value, out = _for_te((grad, *inputs, out), call)
    stats = sums.transpose(1, 2) if call.starts_N is None else sums.flatten(0, 1)
    # Without dropout the state of random numbers is not read.
    random = torch.zeros(2, dtype=torch.int64, device=grad.device)
    options = _te_options(inputs.query, call)
    form = options["o_format"]
    grads = fused_attn_bwd(
        q=query,
        k=key,
        v=value,
        o=out,
        d_o=grad,
        aux_ctx_tensors=[stats.contiguous().unsqueeze(-1), random],
        do_format=form,
        dqkv_layout=options["qkv_layout"],
        **options,
    )
    return Inputs(*(g.view(t.shape) for g, t in zip(grads[:3], inputs, strict=True)))


def _for_te(tensors: tuple[torch.Tensor, ...], call: Call) -> list[torch.Tensor]:
    """Contiguous tensors; rows one after the other where documents are packed."""
    return [t.contiguous() if call.starts_N is None else t.contiguous().flatten(0, 1) for t in tensors]


def _te_options(query: torch.Tensor, call: Call) -> dict[str, object]:
    """What both directions are told. The backend is named, so that it raises where it cannot run."""
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend

    rows, length = query.shape[:2]
    packed = call.starts_N is not None
    starts = call.starts_N
    if starts is None:
        starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
    form = "thd" if packed else "bshd"
    return {
        "max_seqlen_q": call.longest,
        "max_seqlen_kv": call.longest,
        "cu_seqlens_q": starts,
        "cu_seqlens_kv": starts,
        "cu_seqlens_q_padded": starts if packed else None,
        "cu_seqlens_kv_padded": starts if packed else None,
        "fake_dtype": query.dtype,
        "fused_attention_backend": FusedAttnBackend["F16_arbitrary_seqlen"],
        "attn_scale": call.scale,
        "qkv_layout": f"{form}_{form}_{form}",
        "o_format": form,
        "attn_mask_type": "padding_causal" if packed else "causal",
        "window_size": (call.window - 1 if call.window else -1, 0),
    }


def _flattened(
    tensors: tuple[torch.Tensor, ...], call: Call
) -> tuple[list[torch.Tensor], tuple[torch.Tensor | None, torch.Tensor | None, int, int]]:
    """Tensors and lengths as flash attention takes them: rows one after the other where documents are packed."""
    if call.starts_N is None:
        length = tensors[0].shape[1]
        return list(tensors), (None, None, length, length)
    return [t.flatten(0, 1) for t in tensors], (call.starts_N, call.starts_N, call.longest, call.longest)


def _sums_by_row(sums: torch.Tensor, query: torch.Tensor, call: Call) -> torch.Tensor:
    """Log-sum-exps [B, S, H] from [B, H, S], or from [H, T] where documents are packed."""
    if call.starts_N is None:
        return sums.transpose(1, 2)
    return sums.t().unflatten(0, query.shape[:2])


def _sums_by_kernel(sums_BSH: torch.Tensor, call: Call) -> torch.Tensor:
    if call.starts_N is None:
        return sums_BSH.transpose(1, 2).contiguous()
    return sums_BSH.flatten(0, 1).t().contiguous()


KERNELS = {
    "reference": AttentionKernel(_reference, _reference_backward),
    "flash": AttentionKernel(_flash, _flash_backward),
    "cudnn": AttentionKernel(_cudnn, _cudnn_backward),
    "flash4": AttentionKernel(_flash4, _flash4_backward),
    "te": AttentionKernel(_te, _te_backward),
}
