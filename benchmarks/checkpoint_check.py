"""Whether what another tool made has the values of the repository, bit for bit: `checkpoint_check.py OUT SOURCE`.

Reads safetensors, DCP or one `torch.save` file with torch's and safetensors' own readers, undoes the stacking and
renaming of the tools in `checkpoint_peers.py`, and compares with the repository. Exits with the first difference.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from checkpoint_shards import EXPERTS, torchtitan_name
from safetensors import safe_open
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner, _load_state_dict

STACKS = {name: experts for names in EXPERTS.values() for name, experts in names.items()}


def tensors_of(out: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of all tensors that lie directly in a directory."""
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.offset_keys():
                yield name, opened.get_tensor(name)
    state: dict[str, object] = {}
    if (out / ".metadata").exists():
        _load_state_dict(state, FileSystemReader(out), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    for file in out.glob("*.pt"):
        state = torch.load(file, mmap=True)
    if len(state) == 1:
        (state,) = state.values()
    yield from state.items()


def published(name: str, tensor: torch.Tensor, config: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the repository that a tensor holds, under their names there or in torchtitan."""
    layer, rest = re.fullmatch(r"((?:model\.)?layers\.\d+\.)?(.+)", name).groups(default="")
    layer = layer if layer.startswith("model.") else "model." + layer
    if rest in STACKS:
        stack = STACKS[rest]
        for expert, values in enumerate(tensor):
            matrices = (values.T if stack.transposed else values).chunk(len(stack.projections))
            for projection, matrix in zip(stack.projections, matrices, strict=True):
                yield f"{layer}mlp.experts.{expert}.{projection}_proj.weight", matrix
    elif rest == "self_attn.qkv_proj.weight":
        heads = (config["num_attention_heads"], config["num_key_value_heads"], config["num_key_value_heads"])
        parts = tensor.split([count * config["head_dim"] for count in heads])
        for projection, matrix in zip("qkv", parts, strict=True):
            yield f"{layer}self_attn.{projection}_proj.weight", matrix
    else:
        yield name, tensor


def check(out: Path, source: Path) -> None:
    """Exits with a message if a tensor of the repository is missing, doubled, unknown or different."""
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    config = json.loads((source / "config.json").read_text())
    files = {file: safe_open(source / file, "pt") for file in set(index.values())}
    native = {torchtitan_name(name): name for name in index if ".experts." not in name}
    missing = set(index)
    for stored, whole in tensors_of(out):
        for found, tensor in published(stored, whole, config):
            name = native.get(found, found)
            if name not in missing:
                raise SystemExit(f"{out} has {stored} twice, or {source} has it not")
            missing.remove(name)
            original = files[index[name]].get_tensor(name)
            same = tensor.dtype == original.dtype and tensor.shape == original.shape
            if not same or not torch.equal(tensor.contiguous().view(torch.int16), original.view(torch.int16)):
                raise SystemExit(f"{stored} of {out} differs from {name} of {source}")
    if missing:
        raise SystemExit(f"{out} lacks {len(missing)} tensors of {source}, such as {min(missing)}")


if __name__ == "__main__":
    check(Path(sys.argv[1]), Path(sys.argv[2]))
