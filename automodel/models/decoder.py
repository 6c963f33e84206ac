"""The decoder that every native family runs: embeddings, layers, final norm.

Legend: B batch, S sequence, D hidden, V vocabulary, d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from automodel.backends import Backend, require_attention
from automodel.compat import PreTrainedConfig, make_cache, padding_mask_for
from automodel.models.attention import Attention
from automodel.models.delta_net import Documents, GatedDeltaNet
from automodel.models.latent_attention import LatentAttention
from automodel.models.layer import Layer, LayerOutput
from automodel.models.masking import AttentionMask, attention_masks, is_packed
from automodel.models.mlp import GatedMLP, MoeMLP
from automodel.models.norms import RMSNorm
from automodel.models.rope import RotaryEmbedding
from automodel.models.spec import DecoderSpec
from ckpt_tools.core.errors import UsageError


@dataclass(slots=True)
class DecoderOutput:
    """What a forward pass of the decoder leaves behind; the tuples are empty unless asked for."""

    last_hidden_state: torch.Tensor
    past_key_values: Cache | None
    hidden_states: tuple[torch.Tensor, ...]
    attentions: tuple[torch.Tensor, ...]
    router_logits: tuple[torch.Tensor, ...]


class DecoderLayer(Layer):
    """A token mixer (attention, or what its kind of layer has instead) and a feed-forward part, each behind a norm and
    around a residual."""

    def __init__(self, spec: DecoderSpec, layer: int, backend: Backend) -> None:
        super().__init__(spec.attention_kinds[layer], backend)
        if self.kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(spec, spec.delta_net, layer, backend)
        else:
            self.self_attn = attention(spec, layer, backend)
        sparse = spec.moe is not None and layer in spec.moe.layers
        self.mlp = MoeMLP(spec, spec.moe, backend) if sparse else GatedMLP(spec, backend)
        self.input_layernorm = hidden_norm(spec, backend)
        self.post_attention_layernorm = hidden_norm(spec, backend)

    def _scanning(self) -> GatedDeltaNet:
        return self.linear_attn

    def _run(
        self,
        x_BSD: torch.Tensor,
        cos_BSd: torch.Tensor,
        sin_BSd: torch.Tensor,
        mask: AttentionMask | Documents,
        kernel: str,
        past_key_values: Cache | None,
        cache_position: torch.Tensor | None,
    ) -> LayerOutput:
        attended, probabilities = self._mixed(x_BSD, cos_BSd, sin_BSd, mask, kernel, past_key_values, cache_position)
        x_BSD = x_BSD + attended
        output, router_logits = self.mlp(self.post_attention_layernorm(x_BSD))
        return x_BSD + output, probabilities, router_logits

    def _mix(self, x_BSD: torch.Tensor, *inputs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        mixer = self.linear_attn if self.kind == "linear_attention" else self.self_attn
        return mixer(self.input_layernorm(x_BSD), *inputs)


class Decoder(nn.Module):
    """Token ids or embeddings to final hidden states.

    Args:
        config: a transformers config of the family.
        spec: what the family makes of it.
        backend: kernels.

    Attributes:
        layer_class: makes a layer from the spec, its index and the backend.
    """

    layer_class: type[Layer] = DecoderLayer

    def __init__(self, config: PreTrainedConfig, spec: DecoderSpec, backend: Backend) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        self.backend = backend
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, spec.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([self.layer_class(spec, i, backend) for i in range(config.num_hidden_layers)])
        self.norm = hidden_norm(spec, backend)
        self.rotary_emb = RotaryEmbedding(config) if spec.rope else None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        cache_position: torch.Tensor | None = None,
    ) -> DecoderOutput:
        """Run all layers.

        Args:
            input_ids: [B, S]; exclusive with `inputs_embeds` [B, S, D].
            attention_mask: [B, keys] with 0 at padding, or a prepared mask; None means that every token counts.
            position_ids: [B or 1, S]. Where positions restart inside a row and no mask is given, the row holds
                packed documents, and tokens attend only within theirs.
            past_key_values: a cache to read and extend.
            use_cache: return a cache; by default the config says so, and never in training.

        Raises:
            UsageError: arguments that exclude each other, or attention weights asked of a kernel without any.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("give exactly one of input_ids and inputs_embeds")
        kernel = self.config._attn_implementation
        require_attention(kernel)
        if output_attentions and kernel != "eager":
            raise UsageError(
                f"{kernel} attention keeps no attention weights", hint='load the model with attn_implementation="eager"'
            )
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if cache_position is None:
            cache_position = torch.arange(x_BSD.shape[1], device=x_BSD.device) + seen
        masks = self._masks(x_BSD, attention_mask, past_key_values, position_ids, cache_position)
        if any(isinstance(mask, Documents) for mask in masks.values()):
            if use_cache:
                raise UsageError(
                    "a cache of packed documents has no state that a layer with linear attention could go on from",
                    hint="pass use_cache=False, or one document a row",
                )
            use_cache = False
        past_key_values = self._cache(past_key_values, use_cache)
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        cos_BSd, sin_BSd = (None, None) if self.rotary_emb is None else self.rotary_emb(x_BSD, position_ids)

        hidden_states, attentions, router_logits = [x_BSD], [], []
        for layer in self.own_layers:
            x_BSD, probabilities, logits_NE = layer(
                x_BSD,
                cos_BSd,
                sin_BSd,
                masks[layer.kind],
                kernel,
                past_key_values=past_key_values,
                cache_position=cache_position,
            )
            hidden_states.append(x_BSD)
            if layer.kind in {"full_attention", "sliding_attention"}:
                attentions.append(probabilities)
            if logits_NE is not None:
                router_logits.append(logits_NE)
        x_BSD = self.norm(x_BSD)
        return DecoderOutput(
            last_hidden_state=x_BSD,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states[:-1], x_BSD) if output_hidden_states else (),
            attentions=tuple(attentions) if output_attentions else (),
            router_logits=tuple(router_logits),
        )

    @property
    def own_layers(self) -> nn.ModuleList:
        """The layers that run; a checkpoint's layers for multi-token prediction may be held after them."""
        return self.layers[: self.config.num_hidden_layers]

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        if self.training and self.gradient_checkpointing:
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return make_cache(self.config) if use_cache and cache is None else cache

    def _masks(
        self,
        x_BSD: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
        cache_position: torch.Tensor,
    ) -> dict[str, AttentionMask | Documents]:
        if isinstance(attention_mask, dict):
            return attention_mask
        packed = is_packed(position_ids, attention_mask, cache)
        masks: dict[str, AttentionMask | Documents] = dict(
            attention_masks(
                self.config,
                self.spec,
                self.backend,
                x_BSD,
                attention_mask,
                cache=cache,
                packed_BS=position_ids if packed else None,
                cache_position=cache_position,
                training=self.training,
            )
        )
        if "linear_attention" in self.spec.attention_kinds:
            rows, length = x_BSD.shape[:2]
            masks["linear_attention"] = (
                Documents.of(position_ids.expand(rows, -1)) if packed else padding_mask_for(attention_mask, length)
            )
        return masks


def attention(spec: DecoderSpec, layer: int, backend: Backend) -> Attention | LatentAttention:
    """The attention of one layer, of the family's kind."""
    if spec.latent is not None:
        return LatentAttention(spec, spec.latent, layer, backend)
    return Attention(spec, layer, backend)


def hidden_norm(spec: DecoderSpec, backend: Backend) -> RMSNorm:
    """A norm of hidden states, as the family rounds it."""
    return RMSNorm(
        spec.hidden_size,
        spec.norm_eps,
        backend,
        rounds_last=spec.norm_rounds_last,
        zero_centred=spec.zero_centred_norms,
    )
