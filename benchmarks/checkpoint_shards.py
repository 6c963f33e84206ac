"""What trainers save of a Qwen3-MoE repository on 4 ranks, written by torch: `checkpoint_shards.py KIND SOURCE OUT`.

`fsdp` is the `pytorch_model_fsdp_0` of accelerate, TRL and axolotl: DCP under the names that transformers 5 holds in
memory, below `model`, every tensor in 4 parts of its first dimension. `verl` is the same model as verl's FSDP engine
saves it, a pickle for each rank. `torchtitan` is DCP under torchtitan 0.3's names, experts EP 2 x FSDP 2, beside the
index of the repository that its `--hf_assets_path` names.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RANKS = 4


@dataclass(frozen=True)
class Experts:
    """How one tensor holds projections of all experts of a layer, stacked on dimension 0.

    Attributes:
        projections: the published matrices that lie behind each other in it, e.g. `("gate", "up")`.
        transposed: each is `[in, out]`, side by side, where published ones are `[out, in]`.
    """

    projections: tuple[str, ...]
    transposed: bool = False


EXPERTS: Mapping[str, Mapping[str, Experts]] = {
    "transformers": {
        "mlp.experts.gate_up_proj": Experts(("gate", "up")),
        "mlp.experts.down_proj": Experts(("down",)),
    },
    "nemo": {
        "mlp.experts.gate_and_up_projs": Experts(("gate", "up"), transposed=True),
        "mlp.experts.down_projs": Experts(("down",), transposed=True),
    },
    "torchtitan": {
        "moe.routed_experts.inner_experts.w1_EFD": Experts(("gate",)),
        "moe.routed_experts.inner_experts.w2_EDF": Experts(("down",)),
        "moe.routed_experts.inner_experts.w3_EFD": Experts(("up",)),
    },
}
"""The stacked tensors of a layer by whose names they are, without `model.layers.N.` or `layers.N.`."""

TORCHTITAN = {
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "moe.router.gate",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "lm_head",
}
"""torchtitan's name of every other module, without `model.layers.N.` or `layers.N.`."""


def torchtitan_name(name: str) -> str:
    """`layers.0.attention.wo.weight` of `model.layers.0.self_attn.o_proj.weight`."""
    layer, module = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.+)\.weight", name).groups(default="")
    return f"{layer}{TORCHTITAN[module]}.weight"


def save(kind: str, source: Path, out: Path) -> None:
    """Saves a repository on 4 gloo processes as a trainer does; `out` exists and is empty."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as store:
        torch.multiprocessing.spawn(_save_rank, args=(kind, source, out, f"file://{store}/ranks"), nprocs=RANKS)
    if kind == "verl":
        _write_verl_files(source, out)
    if kind == "torchtitan":
        (out / "hf_assets").mkdir()
        for file in ("config.json", "model.safetensors.index.json"):
            shutil.copy(source / file, out / "hf_assets")


def _save_rank(rank: int, kind: str, source: Path, out: Path, store: str) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    state = _state_of_rank(rank, source, "torchtitan" if kind == "torchtitan" else "transformers")
    if kind == "verl":
        torch.save(state, out / f"model_world_size_{RANKS}_rank_{rank}.pt")
    else:
        dcp.save({"model": state} if kind == "fsdp" else state, checkpoint_id=out)
    dist.destroy_process_group()


def _state_of_rank(rank: int, source: Path, names: str) -> dict[str, object]:
    """The DTensors of a rank: experts in EP 2 x FSDP 2 under torchtitan's names, everything else FSDP over 4."""
    import torch
    from safetensors import safe_open
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    everyone = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: safe_open(source / file, "pt") for file in set(index.values())}
    config = json.loads((source / "config.json").read_text())

    def part(name: str, parts: int = 1, number: int = 0) -> torch.Tensor:
        whole = files[index[name]].get_slice(name)
        rows = whole.get_shape()[0] // parts
        return whole[number * rows : (number + 1) * rows].clone()  # torch cannot pickle a slice of the file

    state: dict[str, object] = {}
    for name in index:
        if ".experts." not in name:
            titan = torchtitan_name(name) if names == "torchtitan" else name
            state[titan] = DTensor.from_local(part(name, RANKS, rank), everyone, [Shard(0)])
    mesh, placements, rows = everyone, [Shard(0)], (1, 0)
    if names == "torchtitan":
        mesh = init_device_mesh("cpu", (2, RANKS // 2), mesh_dim_names=("ep", "fsdp"))
        placements, rows = [Shard(0), Shard(1)], (mesh["fsdp"].size(), mesh["fsdp"].get_local_rank())
    experts = torch.arange(config["num_experts"]).chunk(mesh.size(0))[mesh.get_coordinate()[0]].tolist()
    for layer in range(config["num_hidden_layers"]):
        published = f"model.layers.{layer}."
        prefix = published.removeprefix("model.") if names == "torchtitan" else published
        for name, stack in EXPERTS[names].items():
            local = torch.stack(
                [
                    torch.cat([part(f"{published}mlp.experts.{e}.{p}_proj.weight", *rows) for p in stack.projections])
                    for e in experts
                ]
            )
            state[prefix + name] = DTensor.from_local(local, mesh, placements)
        if names == "torchtitan":
            state[prefix + "moe.expert_bias_E"] = torch.zeros(config["num_experts"])
    return state


def _write_verl_files(source: Path, out: Path) -> None:
    """What verl keeps beside the shards: the number of ranks, the config and a tokenizer, here of one word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    (out / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": RANKS}))
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(out / "huggingface")
    shutil.copy(source / "config.json", out / "huggingface")


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
