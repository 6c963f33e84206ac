"""DeepEP's buffer over gloo, for processes without GPUs: what its intranode normal mode sends, returns and demands.

Arguments, shapes, dtypes and demands are those of `deep_ep.Buffer` (`deep_ep/buffers/legacy.py` and
`csrc/legacy/buffer.hpp` of DeepEP 2.1, `deep_ep/buffer.py` and `csrc/deep_ep.cpp` of 1.2.1). It takes any floating
dtype, where DeepEP combines BF16 only.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

Handle = tuple[Tensor, ...]


class Config:
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.tokens * hidden_bytes * num_ranks


class Buffer:
    """Attributes: calls, the names of the calls so far, those that reuse a layout as "dispatch again"."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0) -> None:
        self.group, self.rank, self.group_size = group, dist.get_rank(group), dist.get_world_size(group)
        self.num_nvl_bytes = num_nvl_bytes
        self.calls: list[str] = []

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8)
        return Config(256)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8)
        return Config(512)

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, object]:
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        chosen = torch.nn.functional.one_hot(topk_idx, num_experts).sum(1)
        in_rank = chosen.view(len(topk_idx), self.group_size, num_experts // self.group_size).any(-1)
        return in_rank.sum(0).int(), None, chosen.sum(0).int(), in_rank, object()

    def dispatch(
        self, x: Tensor, handle: Handle | None = None, num_tokens_per_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None, num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None, topk_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, Handle | None, object]:  # fmt: skip
        self._check_rows(x)
        if handle is not None:
            self.calls.append("dispatch again")
            assert topk_idx is None
            assert topk_weights is None
            assert len(handle[4]) == len(x)
            return torch.cat(self._exchange([x[sent] for sent in handle[4].T])), None, None, None, None, object()
        self.calls.append("dispatch")
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert is_token_in_rank.dtype == torch.bool
        assert is_token_in_rank.shape == (len(x), self.group_size)
        assert len(num_tokens_per_rank) == self.group_size
        assert topk_idx.dtype == torch.int64
        assert topk_weights.dtype == torch.float32
        assert topk_idx.is_contiguous()
        assert topk_weights.is_contiguous()
        assert topk_idx.shape == topk_weights.shape
        local = len(num_tokens_per_expert) // self.group_size
        assert local * self.group_size == len(num_tokens_per_expert)
        sent = []
        for rank, mask in enumerate(is_token_in_rank.T):
            index = topk_idx[mask] - rank * local
            elsewhere = (index < 0) | (index >= local)
            sent.append(
                (
                    x[mask],
                    index.masked_fill(elsewhere, -1),
                    topk_weights[mask].masked_fill(elsewhere, 0),
                    mask.nonzero(),
                )
            )
        rows, index, weights, source = zip(*self._exchange(sent), strict=True)
        prefix = torch.tensor([len(part) for part in rows], dtype=torch.int32).cumsum(0).int()
        # DeepEP's matrices by rank and channel say more; what a process reads of them is this.
        handle = (prefix, prefix, prefix, torch.cat(source).flatten().int(), is_token_in_rank, prefix)
        counts = [int((torch.cat(index) == expert).sum()) for expert in range(local)]
        return torch.cat(rows), torch.cat(index), torch.cat(weights), counts, handle, object()

    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, object]:
        self.calls.append("combine")
        self._check_rows(x)
        prefix, _, _, source, in_rank, _ = handle
        assert len(x) == len(source)
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert len(topk_weights) == len(x)
        weights = x.new_zeros(len(x), 0) if topk_weights is None else topk_weights
        starts = [0, *prefix.tolist()]
        parts = [slice(a, b) for a, b in pairwise(starts)]
        out = torch.zeros(len(in_rank), x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        out_weights = torch.zeros(len(in_rank), weights.shape[1])
        for rows, row_weights, tokens in self._exchange([(x[p], weights[p], source[p]) for p in parts]):
            out.index_add_(0, tokens, rows.to(out.dtype))
            out_weights.index_add_(0, tokens, row_weights.float())
        return out.to(x.dtype), None if topk_weights is None else out_weights, object()

    def _exchange(self, for_each: list) -> list:
        """What each process of the group has for this one."""
        everyone: list = [None] * self.group_size
        dist.all_gather_object(everyone, for_each, group=self.group)
        return [theirs[self.rank] for theirs in everyone]

    @staticmethod
    def _check_rows(x: Tensor) -> None:
        assert x.dim() == 2
        assert x.is_contiguous()
        assert x.shape[1] * x.element_size() % 16 == 0
