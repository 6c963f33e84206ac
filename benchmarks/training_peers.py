"""Other libraries' models for `benchmarks/training.py`: transformers, Liger kernels, NVIDIA NeMo AutoModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from training_weights import leaf_values

from ckpt_tools.families import layout_for

Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """How transformers runs a model.

    Attributes:
        experts: its `experts_implementation`.
        compiled: `torch.compile` on each layer.
        liger: Liger's kernels for norms, rope, and head with loss.
        attention: its `attn_implementation`, None for its choice.
    """

    experts: str
    compiled: bool = False
    liger: bool = False
    attention: str | None = None


TRANSFORMERS = {
    "transformers-eager": Peer("eager"),
    "transformers": Peer("grouped_mm"),
    "transformers-compiled": Peer("grouped_mm", compiled=True),
    "transformers-flex-compiled": Peer("grouped_mm", compiled=True, attention="flex_attention"),
    "liger": Peer("grouped_mm", liger=True),
    "liger-compiled": Peer("grouped_mm", compiled=True, liger=True),
}
NEMO = "nemo"
_IN_FLOAT32 = ("NemotronHTopkRouter",)
"""Modules whose weights are published in FP32, and are FP32 in ours; in BF16 small updates of them would be lost."""


def transformers_model(name: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model as transformers makes it, on the meta device."""
    from transformers import AutoModelForCausalLM

    peer = TRANSFORMERS[name]
    if peer.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

        # Its experts have no grouped products; those of transformers stay.
        apply_liger_kernel_to_qwen3_moe(rope=True, rms_norm=True, swiglu=False, fused_linear_cross_entropy=True)
    attention = {} if peer.attention is None else {"attn_implementation": peer.attention}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=peer.experts, **attention)
    for module in model.modules():
        if type(module).__name__ in _IN_FLOAT32:
            module.float()
    if peer.compiled:
        layers = getattr(model, "model", None) or model.backbone
        for layer in layers.layers:
            # On CPUs the code would be compiled for minutes; what is traced is the same.
            layer.compile(backend="inductor" if torch.cuda.is_available() else "aot_eager")
    return model


def transformers_loss(model: nn.Module) -> Loss:
    """The loss of a batch of token ids."""
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def nemo_model(
    config: Any, fields: Mapping[str, Any], device: torch.device
) -> tuple[nn.Module, Loss, Callable[[], None]]:
    """NeMo AutoModel's Qwen3-MoE with torch's kernels (grouped_mm experts, SDPA), its loss, and what fills it.

    Args:
        fields: of the config.
    """
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    from nemo_automodel.components.models.common.utils import BackendConfig
    from nemo_automodel.components.models.qwen3_moe.model import Qwen3MoeForCausalLM

    backend = BackendConfig(
        attn="sdpa",
        linear="torch",
        rms_norm="torch_fp32",
        experts="torch_mm",
        dispatcher="torch",
        enable_hf_state_dict_adapter=False,
        fake_balanced_gate=False,
    )
    with device:
        model = Qwen3MoeForCausalLM(config, backend=backend)
    model.initialize_weights(buffer_device=device, dtype=torch.bfloat16)
    cross_entropy = MaskedCrossEntropy()

    def loss(ids: torch.Tensor) -> torch.Tensor:
        output = model(ids)
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
        # It adds up; without a number of labels that is the loss of the batch, not of a token.
        return cross_entropy(getattr(output, "logits", output), labels, num_label_tokens=ids[:, 1:].numel())

    return model, loss, lambda: _fill(model, fields)


@torch.no_grad()
def _fill(model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Leaves into NeMo's parameters; its experts are stacked and the other way round."""
    shapes = {name: leaf.shape for name, leaf in layout_for(fields).leaves.items()}
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate_and_up_projs", "down_projs")):
            parameter.copy_(leaf_values(name, shapes[name], parameter.dtype, parameter.device))
            continue
        experts = name.rpartition(".")[0]
        parts = ("gate", "up") if name.endswith("gate_and_up_projs") else ("down",)
        for number in range(len(parameter)):
            leaves = [f"{experts}.{number}.{part}_proj.weight" for part in parts]
            tensors = [leaf_values(leaf, shapes[leaf], parameter.dtype, parameter.device).T for leaf in leaves]
            parameter[number].copy_(torch.cat(tensors, dim=-1))
