"""cuDNN's attention, in FP64 and document by document."""

# ruff: noqa: ARG001, PT018

from enum import IntEnum

import torch


class FusedAttnBackend(IntEnum):
    No_Backend = -1
    F16_arbitrary_seqlen = 1
    FP8 = 2


def fused_attn_fwd(
    is_training,
    max_seqlen_q,
    max_seqlen_kv,
    cu_seqlens_q,
    cu_seqlens_kv,
    q,
    k,
    v,
    fake_dtype,
    fused_attention_backend,
    attn_bias=None,
    cu_seqlens_q_padded=None,
    cu_seqlens_kv_padded=None,
    page_table_k=None,
    page_table_v=None,
    s_quantizer=None,
    o_quantizer=None,
    attn_scale=None,
    dropout=0.0,
    fast_zero_fill=True,
    qkv_layout="sbh3d",
    o_format="sbhd",
    qkv_scale_inv_format=None,
    attn_bias_type="no_bias",
    attn_mask_type="padding",
    softmax_type="vanilla",
    window_size=(-1, -1),
    bottom_right_diagonal=None,
    rng_gen=None,
    softmax_offset=None,
    return_max_logit=False,
    cuda_graph=False,
):
    packed = _packed(qkv_layout, attn_mask_type, fused_attention_backend, (q, k, v), cu_seqlens_q, cu_seqlens_q_padded)
    assert o_format == qkv_layout.split("_")[0] and fake_dtype == q.dtype, "the output is like the queries"
    outs, stats = [], []
    for query, key, value in _documents((q, k, v), cu_seqlens_q, max_seqlen_q, packed=packed):
        scores = _scores(query, key, attn_scale, window_size)
        sums = scores.logsumexp(-1)
        outs.append((torch.exp(scores - sums.unsqueeze(-1)) @ _by_head(value, query)).transpose(0, 1))
        stats.append(sums)
    random = torch.zeros(2, dtype=torch.int64)
    if packed:
        return torch.cat(outs).to(q.dtype), [torch.cat(stats, 1).t().float().contiguous().unsqueeze(-1), random]
    return torch.stack(outs).to(q.dtype), [torch.stack(stats).float().unsqueeze(-1), random]


def fused_attn_bwd(
    max_seqlen_q,
    max_seqlen_kv,
    cu_seqlens_q,
    cu_seqlens_kv,
    q,
    k,
    v,
    o,
    d_o,
    fake_dtype,
    aux_ctx_tensors,
    fused_attention_backend,
    cu_seqlens_q_padded=None,
    cu_seqlens_kv_padded=None,
    s_quantizer=None,
    dp_quantizer=None,
    dqkv_quantizer=None,
    attn_scale=None,
    dropout=0.0,
    fast_zero_fill=True,
    qkv_layout="sbh3d",
    o_format="sbhd",
    do_format="sbhd",
    dqkv_layout="sbh3d",
    qkv_scale_inv_format=None,
    do_scale_inv_format=None,
    attn_bias_type="no_bias",
    attn_mask_type="padding",
    softmax_type="vanilla",
    window_size=(-1, -1),
    bottom_right_diagonal=None,
    deterministic=False,
    cuda_graph=False,
):
    tensors = (q, k, v, o, d_o)
    packed = _packed(qkv_layout, attn_mask_type, fused_attention_backend, tensors, cu_seqlens_q, cu_seqlens_q_padded)
    assert dqkv_layout == qkv_layout and o_format == do_format == qkv_layout.split("_")[0], "gradients are like values"
    stats, random = aux_ctx_tensors
    assert stats.is_contiguous() and stats.dtype == torch.float32 and random.shape == (2,), "what the forward pass left"
    sums = stats.squeeze(-1).transpose(0, 1).split(_lengths(cu_seqlens_q), 1) if packed else stats.squeeze(-1).unbind()
    grads = []
    for (query, key, value, *of_out), sum_HS in zip(
        _documents(tensors, cu_seqlens_q, max_seqlen_q, packed=packed), sums, strict=True
    ):
        share = torch.exp(_scores(query, key, attn_scale, window_size) - sum_HS.double().unsqueeze(-1))
        out, grad = (t.double().transpose(0, 1) for t in of_out)
        spread = share * (grad @ _by_head(value, query).mT - (grad * out).sum(-1, keepdim=True)) * attn_scale
        of_key, of_value = spread.mT @ query.double().transpose(0, 1), share.mT @ grad
        groups = key.shape[1]
        shared = [g.unflatten(0, (groups, -1)).sum(1).transpose(0, 1) for g in (of_key, of_value)]
        grads.append([(spread @ _by_head(key, query)).transpose(0, 1), *shared])
    join = torch.cat if packed else torch.stack
    return [*(join(list(parts)).to(q.dtype) for parts in zip(*grads, strict=True)), None, None]


def _packed(qkv_layout, attn_mask_type, backend, tensors, starts, starts_padded):
    if backend != FusedAttnBackend.F16_arbitrary_seqlen:
        raise ValueError("Fused attention does not support this input combination")
    form, *others = qkv_layout.split("_")
    assert others == [form, form] and all(t.is_contiguous() for t in tensors), "three contiguous tensors"
    assert all(t.dtype in (torch.bfloat16, torch.float16) for t in tensors), "FP8 and BF16/FP16 data types"
    assert starts.dtype == torch.int32, "32-bit lengths"
    packed = form == "thd"
    assert attn_mask_type == ("padding_causal" if packed else "causal"), "documents are padded sequences"
    assert not packed or starts_padded is not None, "documents begin somewhere"
    assert all(t.ndim == (3 if packed else 4) for t in tensors), "[T, H, d] or [B, S, H, d]"
    return packed


def _lengths(starts):
    return starts.diff().tolist()


def _documents(tensors, starts, longest, *, packed):
    if packed:
        assert max(_lengths(starts)) <= longest, "a document is longer than the longest"
        return zip(*(t.split(_lengths(starts)) for t in tensors), strict=True)
    return zip(*(t.unbind() for t in tensors), strict=True)


def _by_head(states, query):
    return states.double().transpose(0, 1).repeat_interleave(query.shape[1] // states.shape[1], 0)


def _scores(query, key, scale, window_size):
    before, after = window_size
    assert after == 0, "causal"
    at = torch.arange(len(query))
    back = at.unsqueeze(1) - at
    seen = (back >= 0) & ((back <= before) | (before == -1))
    return (query.double().transpose(0, 1) @ _by_head(key, query).mT * scale).masked_fill(~seen, -torch.inf)
