"""Nemotron-H and Nemotron 3: hybrids of Mamba-2, attention without positions, and squared-ReLU MLPs or experts."""

from __future__ import annotations

import torch
from torch import nn
from transformers import NemotronHConfig
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask

from automodel.kernels.activations import Ungated
from automodel.models.causal_lm import NativeCausalLM
from automodel.models.hybrid import HybridDecoder, HybridPredictLayer
from automodel.models.spec import DecoderSpec, GroupSpec, MambaSpec, MoeSpec
from ckpt_tools.core.errors import UsageError


class NeMoNemotronHForCausalLM(NativeCausalLM):
    """Nemotron-H with a language-model head, computing what transformers' `NemotronHForCausalLM` does.

    Deviations: packed documents (positions that restart) see only themselves; A, D, the time steps and their bias, and
    routers are FP32 throughout; `rescale_prenorm_residual` does not rescale fresh weights. Embeddings are not tied, as
    there.
    Layers for multi-token prediction are held where the checkpoint has them, and neither run nor trained.
    """

    config_class = NemotronHConfig
    transformers_architecture = "NemotronHForCausalLM"
    decoder_class = HybridDecoder
    _no_split_modules = ["HybridLayer", "HybridPredictLayer"]
    _tied_weights_keys = {}
    _is_stateful = True

    def _hold_predict_layers(self, count: int) -> None:
        if count:
            layers = [HybridPredictLayer(self.spec, place, self.backend) for place in range(count)]
            self.mtp = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    @staticmethod
    def decoder_spec(config: NemotronHConfig) -> DecoderSpec:
        if config.mamba_hidden_act != "silu":
            raise UsageError(
                f"Nemotron-H with mamba_hidden_act={config.mamba_hidden_act!r} is not computed, only 'silu'",
                hint="transformers' class computes it: load the checkpoint with transformers",
            )
        kinds = tuple(config.layers_block_type)
        activation = ACT2FN[config.mlp_hidden_act]
        return DecoderSpec(
            hidden_size=config.hidden_size,
            mlp_width=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            norm_eps=config.layer_norm_epsilon,
            activation=activation,
            attention_dropout=config.attention_dropout,
            attention_kinds=kinds,
            mlp_bias=config.mlp_bias,
            norm_rounds_last=True,
            rope=False,
            moe=_moe(config, Ungated(activation)) if "moe" in (*kinds, *config.mtp_layers_block_type) else None,
            mamba=_mamba(config) if "linear_attention" in kinds else None,
            predict_kinds=tuple(config.mtp_layers_block_type),
        )

    @staticmethod
    def create_masks_for_generate(
        config: NemotronHConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: object,
        position_ids: torch.Tensor | None = None,
        **_: object,
    ) -> dict[str, torch.Tensor | None]:
        """Masks of the kinds of layer that need one; transformers cannot make them of kinds that mix no tokens."""
        arguments = {
            "config": config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        return {
            "full_attention": create_causal_mask(**arguments),
            "linear_attention": create_recurrent_attention_mask(**arguments),
        }


def _moe(config: NemotronHConfig, activation: Ungated) -> MoeSpec:
    return MoeSpec(
        num_experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        width=config.moe_intermediate_size,
        normalize=config.norm_topk_prob,
        layers=frozenset(layer for layer, kind in enumerate(config.layers_block_type) if kind == "moe"),
        activation=activation,
        groups=GroupSpec(config.n_group, config.topk_group, config.routed_scaling_factor, keeps_float32=True),
        shared_width=config.moe_shared_expert_intermediate_size,
        latent_size=config.moe_latent_size or 0,
    )


def _mamba(config: NemotronHConfig) -> MambaSpec:
    return MambaSpec(
        num_heads=config.mamba_num_heads,
        head_dim=config.mamba_head_dim,
        groups=config.n_groups,
        state_size=config.ssm_state_size,
        conv_kernel=config.conv_kernel,
        chunk_size=config.chunk_size,
        time_step_min=config.time_step_min,
        time_step_max=config.time_step_max,
        time_step_floor=config.time_step_floor,
        bias=config.use_bias,
        conv_bias=config.use_conv_bias,
    )
