"""State dicts as other trainers hold them, made of a repository's tensors independently of `ckpt_tools`.

Each function follows the trainer's own conversion from Hugging Face, whose source is named. Run against the originals
(torchtitan 0.3.0 and 0.2.2, NeMo AutoModel 0.7.0, torchtune 0.6.1) when this was written, they gave the same tensors;
but for torchtitan's GPT-OSS, whose names are those of its model: its own conversion leaves the experts out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

State = dict[str, torch.Tensor]
Config = Mapping[str, Any]


def tensors_of(root: Path) -> State:
    """The tensors of a repository."""
    return {name: tensor for file in sorted(root.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def save(state: Mapping[str, Any], root: Path) -> Path:
    """A DCP checkpoint, written by torch in this process alone."""
    dcp.save(dict(state), checkpoint_id=root, no_dist=True)
    return root


def equal(a: State, b: State) -> bool:
    """Same names and the same bytes: random bytes hold NaNs, which no comparison of values would find equal."""
    return a.keys() == b.keys() and all(torch.equal(_bytes(a[name]), _bytes(b[name])) for name in a)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def stack_experts(state: State, name: Callable[[str, str], str]) -> State:
    """Tensors of experts stacked; `name` has (the layer's MoE module, the projection)."""
    found: State = {}
    groups: dict[str, dict[int, torch.Tensor]] = {}
    for key, tensor in state.items():
        if expert := re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", key):
            groups.setdefault(name(expert[1], expert[3]), {})[int(expert[2])] = tensor
        else:
            found[key] = tensor
    return found | {key: torch.stack([one[i] for i in range(len(one))]) for key, one in groups.items()}


def in_memory(state: State, config: Config) -> State:
    """transformers 5: `core_model_loading.py` merges gate and up, then stacks; Mixtral's module is called `mlp`."""
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    state = stack_experts(state, lambda module, part: f"{module}.experts.{names.get(part, part)}")
    found = {key: tensor for key, tensor in state.items() if not key.endswith(("experts.gate_proj", "experts.up_proj"))}
    for key in state:
        if key.endswith("experts.gate_proj"):
            up = key.replace("gate_proj", "up_proj")
            found[key.replace("gate_proj", "gate_up_proj")] = torch.cat([state[key], state[up]], 1)
    if config["model_type"] == "mixtral":
        found = {key.replace("block_sparse_moe.", "mlp."): tensor for key, tensor in found.items()}
    return found


def nemo_automodel(state: State, config: Config) -> State:
    """NeMo AutoModel: `moe/state_dict_mixin.py` transposes experts; `gpt_oss/state_dict_adapter.py` renames."""
    if config["model_type"] == "gpt_oss":
        renamed = {"router.": "gate.", "experts.gate_up_proj": "experts.gate_and_up_projs"}
        found = {}
        for key, tensor in state.items():
            if not key.endswith("_bias"):
                for old, new in renamed.items():
                    key = key.replace(old, new)  # noqa: PLW2901
                key = key.replace("experts.down_proj", "experts.down_projs")  # noqa: PLW2901
            found[key] = tensor
        return found
    found = in_memory(state, config)
    for old, new in (("gate_up_proj", "gate_and_up_projs"), ("down_proj", "down_projs")):
        for key in [key for key in found if key.endswith(f"experts.{old}")]:
            found[key.removesuffix(old) + new] = found.pop(key).transpose(1, 2).contiguous()
    return found


_TITAN = {
    "model.embed_tokens.": "tok_embeddings.",
    "model.norm.": "norm.",
    "model.layers.": "layers.",
    "input_layernorm.": "attention_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "self_attn.q_norm.": "attention.q_norm.",
    "self_attn.k_norm.": "attention.k_norm.",
    "self_attn.o_proj.": "attention.wo.",
    "self_attn.sinks": "attention.sinks",
    "mlp.shared_experts.gate_proj.": "moe.shared_experts.w1.",
    "mlp.shared_experts.up_proj.": "moe.shared_experts.w3.",
    "mlp.shared_experts.down_proj.": "moe.shared_experts.w2.",
    "mlp.gate_proj.": "feed_forward.w1.",
    "mlp.up_proj.": "feed_forward.w3.",
    "mlp.down_proj.": "feed_forward.w2.",
    "mlp.gate.weight": "moe.router.gate.weight",
    "mlp.router.": "moe.router.gate.",
    "mlp.gate.e_score_correction_bias": "moe.expert_bias_E",
}
_LATENT = {
    "self_attn.q_proj.": "attention.wq.",
    "self_attn.q_a_proj.": "attention.wq_a.",
    "self_attn.q_a_layernorm.": "attention.q_norm.",
    "self_attn.q_b_proj.": "attention.wq_b.",
    "self_attn.kv_a_proj_with_mqa.": "attention.wkv_a.",
    "self_attn.kv_a_layernorm.": "attention.kv_norm.",
    "self_attn.kv_b_proj.": "attention.wkv_b.",
    "shared_head.norm.": "mtp_norm.",
}
_QKV = {f"self_attn.{n}_proj.": f"attention.qkv_linear.w{n}." for n in "qkv"}
_EXPERTS = {"gate_proj": "w1_EFD", "up_proj": "w3_EFD", "down_proj": "w2_EDF"}
_GPT_OSS = {"gate_up_proj": ("mlp1_weight_EGD", "mlp1_bias_EG"), "down_proj": ("mlp2_weight_EDF", "mlp2_bias_ED")}


def torchtitan(state: State, config: Config) -> State:
    """torchtitan 0.3: `models/*/state_dict_adapter.py` of llama3, qwen3, deepseek_v3 and gpt_oss."""
    kind = config["model_type"]
    inner = "layers.{}.moe.routed_experts.inner_experts."
    state = stack_experts(state, lambda m, part: inner.format(m.split(".")[2]) + _EXPERTS[part])
    found: State = {}
    for key, tensor in state.items():
        layer = key.split(".")[2] if key.startswith("model.layers.") else ""
        if kind == "gpt_oss" and (expert := re.fullmatch(r".*experts\.(gate_up_proj|down_proj)(_bias)?", key)):
            weight, bias = _GPT_OSS[expert[1]]
            found[inner.format(layer) + (bias if expert[2] else weight)] = tensor if expert[2] else tensor.mT
            continue
        if layer and int(layer) >= config["num_hidden_layers"] and key.endswith(("embed_tokens.weight", "head.weight")):
            continue  # torchtitan's layers for multi-token prediction use the model's own embeddings and head
        if kind == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = to_meta_order(tensor, config["head_dim"])  # noqa: PLW2901
        for old, new in {**(_LATENT if kind == "deepseek_v3" else _QKV), **_TITAN}.items():
            key = key.replace(old, new)  # noqa: PLW2901
        found[key] = tensor
    predicted = config["num_hidden_layers"]
    return {key.replace(f"layers.{predicted}.", "mtp_layers.0."): tensor for key, tensor in found.items()}


def torchtitan_02(state: State, config: Config) -> State:
    """torchtitan 0.2.2, the same files."""
    changes = {"qkv_linear.": "", "routed_experts.inner_experts": "experts", "expert_bias_E": "expert_bias"}
    found: State = {}
    for key, tensor in torchtitan(state, config).items():
        for now, before in changes.items():
            key = key.replace(now, before)  # noqa: PLW2901
        key = re.sub(r"_E(FD|DF|GD|G|D)$", "", key)  # noqa: PLW2901
        found[key.replace("lm_head.", "output.")] = tensor
    return found


def torchtune(state: State, config: Config) -> State:
    """torchtune 0.6.1: `models/convert_weights.py` and `models/qwen2/_convert_weights.py`."""
    changes = {
        "model.": "",
        "embed_tokens.": "tok_embeddings.",
        "lm_head.": "output.",
        "self_attn.o_proj.": "attn.output_proj.",
        "self_attn.": "attn.",
        "mlp.gate_proj.": "mlp.w1.",
        "mlp.down_proj.": "mlp.w2.",
        "mlp.up_proj.": "mlp.w3.",
        "input_layernorm.weight": "sa_norm.scale",
        "post_attention_layernorm.weight": "mlp_norm.scale",
    }
    found: State = {}
    for key, tensor in state.items():
        if config["model_type"] == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = to_meta_order(tensor, config["head_dim"])  # noqa: PLW2901
        for old, new in changes.items():
            key = key.replace(old, new)  # noqa: PLW2901
        found["norm.scale" if key == "norm.weight" else key] = tensor
    return found


def to_meta_order(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`_reverse_permute` of torchtitan's llama3 adapter."""
    heads = weight.shape[0] // head_dim
    return weight.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()
