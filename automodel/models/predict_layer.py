"""Layers for multi-token prediction (DeepSeek V3, arXiv 2412.19437, section 2.2), held but not run.

A model that was loaded from a checkpoint with such layers saves them again as they were: training does not touch them.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from automodel.backends import Backend
from automodel.models.decoder import DecoderLayer, attention, hidden_norm
from automodel.models.mlp import MoeMLP
from automodel.models.spec import DecoderSpec


class PredictLayer(nn.Module):
    """The parameters of one layer: a decoder layer with experts, its inputs' norms and projection, and its own head.

    Args:
        spec: shape of a decoder that has experts.
        layer: index of this layer, counted on from those of the decoder.
        vocab_size: V.
        backend: kernels.
    """

    def __init__(self, spec: DecoderSpec, layer: int, vocab_size: int, backend: Backend) -> None:
        super().__init__()
        hidden = spec.hidden_size
        self.embed_tokens = nn.Embedding(vocab_size, hidden)
        self.enorm = hidden_norm(spec, backend)
        self.hnorm = hidden_norm(spec, backend)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.self_attn = attention(spec, layer, backend)
        self.mlp = MoeMLP(spec, spec.moe, backend)
        self.input_layernorm = hidden_norm(spec, backend)
        self.post_attention_layernorm = hidden_norm(spec, backend)
        self.shared_head = nn.ModuleDict(
            {"norm": hidden_norm(spec, backend), "head": nn.Linear(hidden, vocab_size, bias=False)}
        )
        self.requires_grad_(False)


class PredictBlock(nn.Module):
    """The parameters of `mtp.*` (Qwen3-Next, Qwen3.5): decoder layers with full attention that share the model's
    embedding and head, and the norms and the projection of what goes into the first of them.

    Args:
        spec: shape of the model's decoder; the block's layers have experts where the decoder has.
        count: decoder layers.
        backend: kernels.
    """

    def __init__(self, spec: DecoderSpec, count: int, backend: Backend) -> None:
        super().__init__()
        moe = None if spec.moe is None else replace(spec.moe, layers=frozenset(range(count)))
        own = replace(spec, attention_kinds=("full_attention",) * count, moe=moe)
        self.fc = nn.Linear(2 * spec.hidden_size, spec.hidden_size, bias=False)
        self.pre_fc_norm_embedding = hidden_norm(spec, backend)
        self.pre_fc_norm_hidden = hidden_norm(spec, backend)
        self.layers = nn.ModuleList([DecoderLayer(own, layer, backend) for layer in range(count)])
        self.norm = hidden_norm(spec, backend)
        self.requires_grad_(False)
