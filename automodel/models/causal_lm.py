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

from automodel.attention_backends import resolve_sdpa, resolve_spans
from automodel.backends import (
    Backend,
    BackendReport,
    BackendRow,
    Placement,
    Resolved,
    require_attention,
    resolve_layers,
    resolve_loss,
    resolve_norm,
)
from automodel.compat import PreTrainedConfig, tied_weights_keys
from automodel.expert_backends import resolve_experts, resolve_router
from automodel.kernels.activations import Gated
from automodel.kernels.experts import ExpertsKernel
from automodel.models.decoder import Decoder
from automodel.models.delta_net import Decay
from automodel.models.head import LanguageModelHead, can_skip_logits, loss_without_logits
from automodel.models.linear import linear_rows
from automodel.models.mamba import GatedGroupNorm, StateSpace
from automodel.models.norms import GatedRMSNorm, RMSNorm
from automodel.models.predict_layer import PredictLayer
from automodel.models.saving import RepositorySaving
from automodel.models.spec import DecoderSpec, MoeSpec
from automodel.moe.experts import Experts
from automodel.moe.router import TopKRouter, load_balancing_loss
from automodel.parallel.fsdp import computation_dtype
from automodel.scan_backends import resolve_delta_rule, resolve_mamba, resolve_short_conv
from ckpt_tools.core.errors import UsageError

_ATTENDING = ("full_attention", "sliding_attention")
_ATTENTION_NAMES = {"flash4": "FlashAttention-4", "te": "TransformerEngine", "cudnn": "sdpa, cuDNN first"}
_DECAY_RATES = (0.01, 16.0)


class NativeCausalLM(RepositorySaving, PreTrainedModel, GenerationMixin):
    """Base of the native families.

    Args:
        config: an instance of the family's transformers config class, used unchanged.
        backend: kernels; `"auto"`, `"torch"`, a mapping or a `Backend`.
        predict_layers: layers for multi-token prediction to hold for checkpoints; they neither run nor train.

    Attributes:
        decoder_class: what lies between the ids and the head.
    """

    decoder_class: type[Decoder] = Decoder
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
        self.model = self.decoder_class(config, self.spec, self.backend)
        self._hold_predict_layers(predict_layers)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size)
        self.post_init()

    @staticmethod
    @abstractmethod
    def decoder_spec(config: PreTrainedConfig) -> DecoderSpec:
        """What the family's config means for the shared decoder."""

    def _hold_predict_layers(self, count: int) -> None:
        """Make the modules of `count` layers for multi-token prediction, under the names of the family's layout."""
        first = self.config.num_hidden_layers
        for layer in range(first, first + count):
            self.model.layers.append(PredictLayer(self.spec, layer, self.config.vocab_size, self.backend))

    def selective_checkpointing_enable(self, enable: bool = True) -> None:
        """Keep less of attention layers in training: their input, and the output of the attention itself.

        Norm, projections and rotary embeddings run again in the backward pass. That costs less time than
        `gradient_checkpointing_enable`, by which whole layers run again, and frees less memory. Attention that no
        kernel computes (`eager`) runs again, too.

        Raises:
            UsageError: attention drops out, and would drop others when it runs again.
        """
        if enable and self.spec.attention_dropout > 0:
            raise UsageError(
                f"attention drops out ({self.spec.attention_dropout}), which selective checkpointing cannot repeat",
                hint="set attention_dropout to 0 in the model's config, or checkpoint whole layers",
            )
        for layer in self.model.own_layers:
            layer.recomputes_attention = enable and layer.kind in _ATTENDING

    @property
    def is_selective_checkpointing(self) -> bool:
        """Whether `selective_checkpointing_enable` is in force."""
        return any(layer.recomputes_attention for layer in self.model.own_layers)

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
        skip_logits: bool = False,
        **loss_arguments: object,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast | tuple[object, ...]:
        """Logits [B, S, V], and the loss when `labels` [B, S] are given; the arguments are transformers' own.

        Args:
            labels: token ids; -100 is ignored; shifted here.
            output_router_logits: also return the router logits of each expert layer and add the load-balancing
                loss, times `router_aux_loss_coef`, to the loss.
            logits_to_keep: compute only the last so many positions (0: all), or those that the indices name.
            skip_logits: where there are labels, the logits are not wanted: they are None where the fused loss runs.
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
        has_labels = labels is not None or loss_arguments.get("shift_labels") is not None
        loss = logits = None
        if skip_logits and has_labels and self._fuses_loss(decoded.last_hidden_state, loss_arguments):
            loss = loss_without_logits(self.lm_head, decoded.last_hidden_state, labels, **loss_arguments)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(decoded.last_hidden_state[:, kept])
            if has_labels:
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

    def _fuses_loss(self, hidden_states: torch.Tensor, loss_arguments: dict[str, object]) -> bool:
        fused = resolve_loss(self.backend, hidden_states.device).kernel == "fused"
        return fused and can_skip_logits(self.loss_function, loss_arguments)

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

    def backend_report(self, device: torch.device | None = None) -> BackendReport:
        """What runs each kind of layer of this model, and why not a faster kernel.

        Args:
            device: where its parameters would be, None for where they are now.
        """
        weight = Placement(device or self.lm_head.weight.device, computation_dtype(self))
        norm = resolve_norm(self.backend, weight.device, weight.dtype)
        sdpa = resolve_sdpa(self.backend, weight.device, weight.dtype, self.spec.scored_dim)
        spans = resolve_spans(self.backend, weight.device, weight.dtype, self.spec.scored_dim)
        layers = resolve_layers(self.backend, weight.device, training=self.training)
        loss = resolve_loss(self.backend, weight.device)
        norms = sum(isinstance(module, RMSNorm) for module in self.modules())
        delta_nets = self.spec.attention_kinds.count("linear_attention") if self.spec.delta_net else 0
        compilable = sum(layer.can_compile(*weight) for layer in self.model.own_layers)
        attention = self.config._attn_implementation
        attending = sum(kind in _ATTENDING for kind in self.spec.attention_kinds)
        slower = "asked for" if attention == "eager" else sdpa.reason
        if attention == "sdpa" and sdpa.kernel != "torch":
            attention = _ATTENTION_NAMES[sdpa.kernel]
        apart = Resolved("mask", "asked for") if attention == "eager" else spans
        rows = [
            BackendRow("attention", attending, attention, slower),
            BackendRow("packed or windowed", attending, apart.kernel, apart.reason),
            BackendRow("norm", norms, norm.kernel, norm.reason),
            *linear_rows(self.backend, self.modules(), weight.device, weight.dtype),
            BackendRow("layers", compilable, layers.kernel, layers.reason),
            BackendRow("loss", 1, loss.kernel, loss.reason),
        ]
        if scanning := self.config.num_hidden_layers - compilable:
            rows.append(
                BackendRow("layers that scan", scanning, "eager", "the scans of the references are not compiled")
            )
        if delta_nets:
            rule = resolve_delta_rule(self.backend, weight.device, weight.dtype, training=self.training)
            conv = resolve_short_conv(self.backend, weight.device)
            rows.insert(1, BackendRow("linear attention", delta_nets, rule.kernel, rule.reason))
            rows.insert(2, BackendRow("short convolution", delta_nets, conv.kernel, conv.reason))
        if moe := self.spec.moe:
            divided = [m for m in self.modules() if isinstance(m, Experts) and m.dispatcher is not None]
            resolved = self._experts_kernel(moe, weight)
            rows.insert(1, BackendRow("experts", len(moe.layers), resolved.kernel, resolved.reason))
            router = resolve_router(self.backend, weight.device, moe.num_experts)
            rows.insert(2, BackendRow("router", len(moe.layers), router.kernel, router.reason))
            if divided:
                dispatch = divided[0].resolve_dispatch(resolved.kernel)
                rows.insert(2, BackendRow("dispatch", len(divided), dispatch.kernel, dispatch.reason))
        if mamba := self.spec.mamba:
            scan = resolve_mamba(self.backend, weight.device, weight.dtype, mamba.convolved, mamba.conv_kernel)
            scans = self.spec.attention_kinds.count("linear_attention")
            rows.insert(1, BackendRow("mamba", scans, scan.kernel, scan.reason))
        return BackendReport(tuple(rows))

    def _experts_kernel(self, moe: MoeSpec, weight: Placement) -> Resolved[ExpertsKernel]:
        activation = moe.activation or Gated(self.spec.activation)
        hidden = moe.latent_size or self.spec.hidden_size
        return resolve_experts(self.backend, *weight, hidden, moe.width, activation, bias=moe.bias)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            constant = fresh_constant(module, name)
            if constant is None:
                draw_fresh(parameter, module, name, self.config.initializer_range)
            else:
                parameter.fill_(constant)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0.0


def fresh_constant(owner: nn.Module, name: str) -> float | None:
    """What a parameter of `owner` holds before training, None where its values are random; as transformers has it."""
    if isinstance(owner, StateSpace):
        return None
    if isinstance(owner, (RMSNorm, GatedRMSNorm, GatedGroupNorm)):
        return 0.0 if getattr(owner, "zero_centred", False) else 1.0
    if isinstance(owner, Decay) and name == "dt_bias":
        return 1.0
    is_bias = name.endswith("bias")  # experts call theirs down_proj_bias; a router's is random
    return 0.0 if is_bias and not isinstance(owner, TopKRouter) else None


def draw_fresh(
    values: torch.Tensor, owner: nn.Module, name: str, std: float, generator: torch.Generator | None = None
) -> None:
    """Fill `values` as transformers does for a parameter of `owner`: normal, or what a layer with a memory needs."""
    if isinstance(owner, StateSpace):
        values.copy_(owner.fresh_values(name, generator))
    elif isinstance(owner, Decay) and name == "A_log":
        values.uniform_(*_DECAY_RATES, generator=generator).log_()
    else:
        values.normal_(0.0, std, generator=generator)


def _default(value: bool | None, fallback: bool) -> bool:
    return fallback if value is None else value
