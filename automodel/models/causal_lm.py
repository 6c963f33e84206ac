"""The causal language model around the decoder: head, losses, generation, initialisation.

A family is a subclass that names its config class and turns a config into a `DecoderSpec`. Everything that
transformers offers on a `PreTrainedModel` (generate, gradient checkpointing, Trainer) works on it.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from automodel.backends import (
    Backend,
    BackendReport,
    BackendRow,
    require_attention,
    resolve_experts,
    resolve_norm,
)
from automodel.compat import PreTrainedConfig, tied_weights_keys
from automodel.models.decoder import Decoder
from automodel.models.norms import RMSNorm
from automodel.models.predict_layer import PredictLayer
from automodel.models.saving import RepositorySaving
from automodel.models.spec import DecoderSpec
from automodel.moe.router import TopKRouter, load_balancing_loss
from ckpt_tools.core.errors import UsageError


class NativeCausalLM(RepositorySaving, PreTrainedModel, GenerationMixin):
    """Base of the native families.

    Args:
        config: an instance of the family's transformers config class, used unchanged.
        backend: kernels; `"auto"`, `"torch"`, a mapping or a `Backend`.
        predict_layers: layers for multi-token prediction to hold for checkpoints; they neither run nor train.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["DecoderLayer", "PredictLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = tied_weights_keys("lm_head.weight", "model.embed_tokens.weight")

    def __init__(
        self, config: PreTrainedConfig, backend: str | Backend | dict[str, str] = "auto", *, predict_layers: int = 0
    ) -> None:
        require_attention(config._attn_implementation)
        super().__init__(config)
        self.backend = Backend.parse(backend)
        self.spec = self.decoder_spec(config)
        self.model = Decoder(config, self.spec, self.backend)
        for layer in range(config.num_hidden_layers, config.num_hidden_layers + predict_layers):
            self.model.layers.append(PredictLayer(self.spec, layer, config.vocab_size, self.backend))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    @abstractmethod
    def decoder_spec(config: PreTrainedConfig) -> DecoderSpec:
        """What the family's config means for the shared decoder."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **loss_arguments: object,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast | tuple[object, ...]:
        """Logits [B, S, V], and the loss when `labels` [B, S] are given; the arguments are transformers' own.

        Args:
            labels: token ids; -100 is ignored; shifted here.
            output_router_logits: also return the router logits of each expert layer and add the load-balancing
                loss, times `router_aux_loss_coef`, to the loss.
            logits_to_keep: compute only the last so many positions (0: all), or those that the indices name.
            loss_arguments: `num_items_in_batch`, `shift_labels`, `ignore_index`.
        """
        decoded = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=_default(output_attentions, self.config.output_attentions),
            output_hidden_states=_default(output_hidden_states, self.config.output_hidden_states),
            cache_position=cache_position,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(decoded.last_hidden_state[:, kept])
        loss = None
        if labels is not None or loss_arguments.get("shift_labels") is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **loss_arguments)
        common = {
            "logits": logits,
            "past_key_values": decoded.past_key_values,
            "hidden_states": decoded.hidden_states or None,
            "attentions": decoded.attentions or None,
        }
        if self.spec.moe is None:
            output = CausalLMOutputWithPast(loss=loss, **common)
        else:
            # transformers 4.57 has no such field in DeepSeek's config.
            wanted = _default(output_router_logits, getattr(self.config, "output_router_logits", False))
            wanted = wanted and bool(decoded.router_logits)
            aux_loss = None
            # Routers with groups balance the load by their bias, without a loss.
            if wanted and self.spec.moe.groups is None:
                aux_loss = load_balancing_loss(decoded.router_logits, self.spec.moe.top_k, attention_mask)
                if loss is not None:
                    loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
            output = MoeCausalLMOutputWithPast(
                loss=loss, aux_loss=aux_loss, router_logits=decoded.router_logits if wanted else None, **common
            )
        return output if _default(return_dict, getattr(self.config, "return_dict", True)) else output.to_tuple()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> Decoder:
        return self.model

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Embedding:
        """As transformers does it; a sharded model refuses.

        Raises:
            UsageError: the embedding is sharded over a mesh.
        """
        if isinstance(self.model.embed_tokens.weight, DTensor):
            raise UsageError(
                "the embedding of a sharded model cannot be resized",
                hint="resize before sharding: load without device_mesh, resize, save, and load the result",
            )
        return super().resize_token_embeddings(*args, **kwargs)

    def backend_report(self) -> BackendReport:
        """What runs each kind of layer of this model where its parameters are now, and why not a faster kernel."""
        weight = self.lm_head.weight
        norm = resolve_norm(self.backend, weight.device, weight.dtype)
        norms = sum(isinstance(module, RMSNorm) for module in self.modules())
        attention = self.config._attn_implementation
        slower = "asked for" if attention == "eager" else ""
        rows = [
            BackendRow("attention", self.config.num_hidden_layers, attention, slower),
            BackendRow("norm", norms, norm.kernel, norm.reason),
            BackendRow("linear", sum(isinstance(m, nn.Linear) for m in self.modules()), "torch", ""),
        ]
        if moe := self.spec.moe:
            resolved = resolve_experts(self.backend, weight.device, weight.dtype, self.spec.hidden_size, moe.width)
            rows.insert(1, BackendRow("experts", len(moe.layers), resolved.kernel, resolved.reason))
        return BackendReport(tuple(rows))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            constant = fresh_constant(module, name)
            if constant is None:
                parameter.normal_(0.0, self.config.initializer_range)
            else:
                parameter.fill_(constant)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0.0


def fresh_constant(owner: nn.Module, name: str) -> float | None:
    """What a parameter of `owner` holds before training, None where its values are random; as transformers has it."""
    if isinstance(owner, RMSNorm):
        return 1.0
    is_bias = name.endswith("bias")  # experts call theirs down_proj_bias; a router's is random
    return 0.0 if is_bias and not isinstance(owner, TopKRouter) else None


def _default(value: bool | None, fallback: bool) -> bool:
    return fallback if value is None else value
