"""What other tools do with the files of `checkpoints.py`, a process each: `checkpoint_peers.py TOOL SOURCE OUT`.

Each is called as its own documentation says. `stream` is the best of the scripts that people write by hand: it holds
one layer at a time. Runs under any Python that has the tool; `checkpoint_peers.txt` says how to make one that has them
all. `checkpoint_peers.py --probe MODULE ...` prints which modules cannot be imported, and the versions of `PACKAGES`.

Not called: torchtitan's conversion scripts, because its wheel lacks them (the functions here do what they do); NeMo
AutoModel's `from_pretrained`, because its model cannot be built without a GPU; verl's, NeMo's and axolotl's pinned
transformers, because there are three.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torchtitan.models.qwen3 import Qwen3StateDictAdapter

PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "nemo-automodel", "torchtitan", "verl", "axolotl")


@dataclass(frozen=True)
class Tool:
    """A function that makes the directory `out` of `source`, and the module of the tool that it imports."""

    run: Callable[[Path, Path], None]
    module: str


TOOLS: dict[str, Tool] = {}


def tool(module: str) -> Callable[[Callable[[Path, Path], None]], Callable[[Path, Path], None]]:
    """Enters a function in `TOOLS` under its name."""

    def enter(run: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        TOOLS[run.__name__] = Tool(run, module)
        return run

    return enter


@tool("transformers")
def transformers(source: Path, out: Path) -> None:
    """`from_pretrained` and `save_pretrained` in the form that transformers 5 holds in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="1GB", save_original_format=False)


@tool("safetensors.torch")
def stream(source: Path, out: Path) -> None:
    """safe_open, stack and save_file, layer by layer."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    config = json.loads((source / "config.json").read_text())
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: safe_open(source / file, "pt") for file in set(index.values())}
    experts = range(config["num_experts"])
    out.mkdir()

    def get(name: str) -> torch.Tensor:
        return files[index[name]].get_tensor(name)

    def pair(block: str, e: int) -> torch.Tensor:
        return torch.cat([get(f"{block}{e}.gate_proj.weight"), get(f"{block}{e}.up_proj.weight")])

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        block, attention = prefix + "mlp.experts.", prefix + "self_attn."
        fused = [f"{attention}{x}_proj.weight" for x in "qkv"]
        tensors = {
            block + "gate_up_proj": torch.stack([pair(block, e) for e in experts]),
            block + "down_proj": torch.stack([get(f"{block}{e}.down_proj.weight") for e in experts]),
            attention + "qkv_proj.weight": torch.cat([get(name) for name in fused]),
        }
        rest = (n for n in index if n.startswith(prefix) and ".experts." not in n and n not in fused)
        tensors.update({name: get(name) for name in rest})
        save_file(tensors, out / f"model-{layer:05d}.safetensors", metadata={"format": "pt"})
    rest = (name for name in index if ".layers." not in name)
    save_file({name: get(name) for name in rest}, out / "model-rest.safetensors", metadata={"format": "pt"})


@tool("nemo_automodel.components.models.qwen3_moe.state_dict_adapter")
def nemo(source: Path, out: Path) -> None:
    """NeMo AutoModel's `Qwen3MoeStateDictAdapter.from_hf`, then `dcp.save`: experts are transposed."""
    import torch
    import torch.distributed.checkpoint as dcp
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.qwen3_moe.state_dict_adapter import Qwen3MoeStateDictAdapter
    from nemo_automodel.components.moe.config import MoEConfig
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text())
    # As its model does, which cannot be built without a GPU.
    experts = MoEConfig(
        dim=config["hidden_size"],
        inter_dim=config["intermediate_size"],
        moe_inter_dim=config["moe_intermediate_size"],
        n_routed_experts=config["num_experts"],
        n_shared_experts=0,
        n_activated_experts=config["num_experts_per_tok"],
        n_expert_groups=0,
        n_limited_groups=0,
        train_gate=True,
        gate_bias_update_factor=0.0,
        score_func="softmax",
        route_scale=1.0,
        aux_loss_coeff=0.0,
        norm_topk_prob=config["norm_topk_prob"],
        dtype=torch.bfloat16,
    )
    state: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        state.update(load_file(file))
    adapter = Qwen3MoeStateDictAdapter(config, experts, BackendConfig(), dtype=torch.bfloat16)
    dcp.save(adapter.from_hf(state), checkpoint_id=out)


@tool("torch.distributed.checkpoint")
def torch_consolidate(source: Path, out: Path) -> None:
    """torch's own consolidation of sharded safetensors."""
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    out.mkdir()
    consolidate_safetensors_files(str(source), str(out), _files_of_names(source), num_threads=2)


@tool("nemo_automodel.components.checkpoint._backports.consolidate_hf_safetensors")
def nemo_consolidate(source: Path, out: Path) -> None:
    """NeMo AutoModel's consolidation of sharded safetensors."""
    from nemo_automodel.components.checkpoint._backports.consolidate_hf_safetensors import consolidate_safetensors_files

    out.mkdir()
    consolidate_safetensors_files(str(source), str(out), _files_of_names(source), num_threads=2)


@tool("transformers.distributed")
def transformers_consolidate(source: Path, out: Path) -> None:
    """transformers' `consolidate_distributed_checkpoint`, which makes one file."""
    from transformers.distributed import consolidate_distributed_checkpoint

    consolidate_distributed_checkpoint(source, out)


def _files_of_names(source: Path) -> dict[str, int]:
    return json.loads((source / "fqn_to_file_index_mapping.json").read_text())


@tool("torch.distributed.checkpoint")
def dcp_to_torch_save(source: Path, out: Path) -> None:
    """torch's own way from DCP to one file."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as convert

    out.mkdir()
    convert(str(source), str(out / "model.pt"))


@tool("accelerate")
def accelerate(source: Path, out: Path) -> None:
    """`accelerate merge-weights`."""
    from accelerate.utils import merge_fsdp_weights

    merge_fsdp_weights(str(source), str(out))


@tool("axolotl.cli.merge_sharded_fsdp_weights")
def axolotl(source: Path, out: Path) -> None:
    """`axolotl merge-sharded-fsdp-weights` behind its configuration file."""
    from axolotl.cli.merge_sharded_fsdp_weights import merge_fsdp_weights

    merge_fsdp_weights(str(source), str(out))


@tool("verl.model_merger.fsdp_model_merger")
def verl(source: Path, out: Path) -> None:
    """`python -m verl.model_merger merge --backend fsdp`."""
    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    files = {"local_dir": str(source), "hf_model_config_path": str(source / "huggingface"), "target_dir": str(out)}
    FSDPModelMerger(ModelMergerConfig(operation="merge", backend="fsdp", **files)).merge_and_save()


@tool("torchtitan.models.qwen3")
def torchtitan(source: Path, out: Path) -> None:
    """torchtitan's `convert_from_hf.py`, which its wheel lacks, in BF16 in place of FP32."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    with torch.inference_mode():
        state, adapter = _torchtitan_model(source)
        stored = adapter.to_hf(state)
        dcp.load(stored, storage_reader=HuggingFaceStorageReader(str(source)))
        dcp.save(adapter.from_hf(stored), checkpoint_id=out)


@tool("torchtitan.models.qwen3")
def torchtitan_consolidate(source: Path, out: Path) -> None:
    """torchtitan's `convert_to_hf.py`, which its wheel lacks, in BF16 in place of FP32."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    with torch.inference_mode():
        state, adapter = _torchtitan_model(source / "hf_assets")
        dcp.load(state, checkpoint_id=source)
        writer = HuggingFaceStorageWriter(
            path=str(out),
            save_distributed=True,
            fqn_to_index_mapping=adapter.fqn_to_index_mapping,
            enable_consolidation=True,
            thread_count_consolidation=5,
        )
        dcp.save(adapter.to_hf(state), storage_writer=writer)


def _torchtitan_model(assets: Path) -> tuple[dict[str, torch.Tensor], Qwen3StateDictAdapter]:
    """The state dict of torchtitan's Qwen3 with the sizes in `config.json`, on the host, and the adapter for it."""
    import torch
    from torchtitan.components.checkpointer import ModelWrapper
    from torchtitan.models import qwen3
    from torchtitan.models.common import CosSinRoPE, Embedding, Linear

    config = json.loads((assets / "config.json").read_text())
    width, words, head = config["hidden_size"], config["vocab_size"], config["head_dim"]
    rope = CosSinRoPE.Config(dim=head, max_seq_len=config["max_position_embeddings"], theta=config["rope_theta"])
    model = qwen3.Qwen3Model.Config(
        vocab_size=words,
        dim=width,
        norm=qwen3._qwen3_norm(width),
        tok_embeddings=Embedding.Config(num_embeddings=words, embedding_dim=width, param_init=qwen3._EMBEDDING_INIT),
        lm_head=Linear.Config(in_features=width, out_features=words, param_init=qwen3._LINEAR_INIT),
        layers=qwen3._build_qwen3_moe_layers(
            n_layers=config["num_hidden_layers"],
            dim=width,
            n_heads=config["num_attention_heads"],
            n_kv_heads=config["num_key_value_heads"],
            head_dim=head,
            moe_hidden_dim=config["moe_intermediate_size"],
            num_experts=config["num_experts"],
            top_k=config["num_experts_per_tok"],
            attn_backend="flex",
            moe_comm_backend="standard",
            rope=rope,
        ),
    )
    torch.set_default_dtype(torch.bfloat16)
    adapter = qwen3.Qwen3StateDictAdapter(model, str(assets))
    return ModelWrapper(model.build())._get_state_dict(), adapter


def probe(modules: Sequence[str]) -> dict[str, object]:
    """The modules that cannot be imported, with the reason, and the Python and packages that were asked."""
    missing = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # an import may fail in any way where a dependency has another version
            missing[module] = f"{type(error).__name__}: {error}"
    found = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    versions = {name: found[name] for name in PACKAGES if name in found}
    return {"python": platform.python_version(), "packages": versions, "missing": missing}


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", AXOLOTL_DO_NOT_TRACK="1")
    if sys.argv[1] == "--probe":
        print(json.dumps(probe(sys.argv[2:])))
    else:
        TOOLS[sys.argv[1]].run(Path(sys.argv[2]), Path(sys.argv[3]))
