"""What other tools do with the files of `checkpoints.py`, a process each: `checkpoint_peers.py TOOL SOURCE OUT`.

Each is called as its own documentation says. `stream` is the best of the scripts that people write by hand: it holds
one layer at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path


def transformers(source: Path, out: Path) -> None:
    """`from_pretrained` and `save_pretrained` in the form that transformers 5 holds in memory."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="1GB", save_original_format=False)


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


def torch_consolidate(source: Path, out: Path) -> None:
    """torch's own consolidation of sharded safetensors."""
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    out.mkdir()
    mapping = json.loads((source / "fqn_to_file_index_mapping.json").read_text())
    consolidate_safetensors_files(str(source), str(out), mapping, num_threads=2)


def dcp_to_torch_save(source: Path, out: Path) -> None:
    """torch's own way from DCP to one file."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as convert

    out.mkdir()
    convert(str(source), str(out / "model.pt"))


def accelerate(source: Path, out: Path) -> None:
    """`accelerate merge-weights`."""
    from accelerate.utils import merge_fsdp_weights

    merge_fsdp_weights(str(source), str(out))


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    tool.__name__: tool for tool in (transformers, stream, torch_consolidate, dcp_to_torch_save, accelerate)
}

if __name__ == "__main__":
    TOOLS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
