"""Causal attention within documents, in sliding windows and with sinks, without masks: one operation, several kernels.

No mask of S x S exists, work grows with the lengths of documents and windows, and grouped heads stay grouped.

A sink is a logit that joins a row's softmax and gives no value. Kernels need not know it: from their output O and
log-sum-exp L, with the sink s, come L' = log(exp(L) + exp(s)) and O' = O exp(L - L'). The kernels' backward passes
recompute probabilities as exp(scores - L) and subtract rowsum(dO * O); given O' and L' they return the gradients of the
softmax with the sink, whose own gradient is -sum over rows of exp(s - L') rowsum(dO * O').

Legend: B batch, S sequence, H heads, G kv heads, d head_dim, T = B * S, N documents of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.autograd.function import FunctionCtx

from automodel.kernels import attention_calls
from automodel.kernels.packages import is_installed

FlashKernel = Literal["reference", "flash", "cudnn", "flash4", "te"]
_LARGEST_HEAD = 256
_Gradients = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Spans:
    """What a token attends to, in place of a mask: the tokens before it in its document, or the last few of them.

    Attributes:
        starts_N: int32 [N + 1], where each document of the flattened rows begins, then T. None: a document a row.
        longest: bound of a document's length in tokens.
        window: tokens that a token sees, itself included; 0 for all before it.
        kernel: what computes.
    """

    starts_N: torch.Tensor | None
    longest: int
    window: int
    kernel: FlashKernel


def document_starts(position_ids_BS: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`starts_N` and `longest` of rows in which a document begins wherever a position does not follow the one before.

    Waits for the device. `longest` is rounded up to a power of two, so that compiled layers see few values of it.
    """
    begins_BS = torch.ones_like(position_ids_BS, dtype=torch.bool)
    begins_BS[:, 1:] = position_ids_BS.diff(dim=-1) != 1
    starts = begins_BS.flatten().nonzero().squeeze(1).to(torch.int32)
    starts_N = torch.cat((starts, starts.new_full((1,), begins_BS.numel())))
    longest = int(starts_N.diff().max())
    return starts_N, min(position_ids_BS.shape[1], 1 << (longest - 1).bit_length())


def flash_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why torch's flash attention cannot run, or None when it can."""
    if device.type != "cuda":
        return "flash attention needs CUDA"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention does not take {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > _LARGEST_HEAD:
        return f"flash attention takes heads of a multiple of 8 up to {_LARGEST_HEAD} values, not of {head_dim}"
    return None


def flash4_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashAttention-4 cannot run, or None when it can."""
    if obstacle := flash_obstacle(device, dtype, head_dim):
        return obstacle
    if not is_installed("flash_attn.cute"):
        return "FlashAttention-4 (flash-attn-4) is not installed"
    return None


def causal_attention(
    query_BSHd: torch.Tensor,
    key_BSGd: torch.Tensor,
    value_BSGd: torch.Tensor,
    spans: Spans,
    *,
    scale: float,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * query key^T) value over what `spans` lets a token see, [B, S, H, d].

    Args:
        query_BSHd: of one dtype with keys and values; H is a multiple of G.
        scale: on the products.
        sinks_H: a logit for each head that joins the softmax; None for none.
    """
    out, _ = _causal_attention(
        query_BSHd,
        key_BSGd,
        value_BSGd,
        sinks_H,
        spans.starts_N,
        spans.longest,
        spans.window,
        scale,
        spans.kernel,
    )
    return out


@torch.library.custom_op("automodel::causal_attention", mutates_args=())
def _causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    starts: torch.Tensor | None,
    longest: int,
    window: int,
    scale: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the log-sum-exp FP32 [B, S, H], both with the sinks."""
    call = attention_calls.Call(starts, longest, window, scale)
    inputs = attention_calls.Inputs(query, key, value)
    out, sums_BSH = attention_calls.KERNELS[kernel].forward(inputs, call)
    if sinks is None:
        return out.contiguous(), sums_BSH.contiguous()
    if out.is_cuda and is_installed("triton"):
        from automodel.kernels.triton_sinks import add_sinks

        return add_sinks(out, sums_BSH, sinks)
    with_sink_BSH = torch.logaddexp(sums_BSH, sinks.float())
    out = (out * torch.exp(sums_BSH - with_sink_BSH).unsqueeze(-1)).to(query.dtype)
    return out.contiguous(), with_sink_BSH.contiguous()


@_causal_attention.register_fake
def _(query, key, value, sinks, starts, longest, window, scale, kernel):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("automodel::causal_attention_backward", mutates_args=())
def _causal_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    starts: torch.Tensor | None,
    longest: int,
    window: int,
    scale: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = attention_calls.Call(starts, longest, window, scale)
    inputs = attention_calls.Inputs(query, key, value)
    grads = attention_calls.KERNELS[kernel].backward(grad.contiguous(), inputs, out, sums, call)
    return grads.query.contiguous(), grads.key.contiguous(), grads.value.contiguous()


@_causal_attention_backward.register_fake
def _(grad, query, key, value, out, sums, starts, longest, window, scale, kernel):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: FunctionCtx, inputs: tuple[object, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, sinks, starts, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, sinks, starts, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: FunctionCtx, grad: torch.Tensor | None, _: torch.Tensor | None) -> _Gradients:
    query, key, value, sinks, starts, out, sums_BSH = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    grads = _causal_attention_backward(grad, query, key, value, out, sums_BSH, starts, *ctx.options)
    grad_sinks = None
    if sinks is not None:
        shares_BSH = torch.exp(sinks.float() - sums_BSH)
        grad_sinks = -(shares_BSH * (grad.float() * out.float()).sum(-1)).sum((0, 1)).to(sinks.dtype)
    return (*grads, grad_sinks, None, None, None, None, None)


_causal_attention.register_autograd(_backward, setup_context=_save)
