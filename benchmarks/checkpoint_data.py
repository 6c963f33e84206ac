"""The checkpoints that the benchmarks read, made once: repositories as published ones are, and shards as trainers save.

Values are random finite BF16 numbers; the same call always makes the same bytes.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.engine.checkpoint import open_checkpoint
from ckpt_tools.engine.sharding import shard_range
from ckpt_tools.families import layout_for
from ckpt_tools.formats.sharded_safetensors import plan_sharded

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 32768,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
GPT_OSS = {
    **{k: v for k, v in CONFIG.items() if k not in ("num_experts", "moe_intermediate_size", "mlp_only_layers")},
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "intermediate_size": 1024,
    "num_local_experts": 32,
    "attention_bias": True,
}
GPT_OSS_20B = {
    **GPT_OSS,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
"""The widths of GPT-OSS-20B: experts of 33 and 17 MB that lie the other way round in the native layout."""


def make_source(root: Path, layers: int, shape: Mapping[str, object] = CONFIG, label: str = "hf") -> Path:
    """The repository of a configuration with so many layers, in files of about 1 GB."""
    config = {**shape, "num_hidden_layers": layers}
    source = root / f"{label}-{layers}"
    if source.exists():
        return source
    layout = layout_for(config)
    assert layout is not None
    making = _empty(root / "making")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name in sorted(layout.leaves):
        if sum(2 * math.prod(shape) for shape in shards[-1].values()) > 10**9:
            shards.append({})
        shards[-1][name] = layout.leaves[name].shape
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_packed(making / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    (making / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (making / "config.json").write_text(json.dumps(config))
    making.rename(source)
    return source


def write_packed(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file as published ones are: BF16 tensors one after the other behind an unaligned header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Clearing the high exponent bit of each little-endian BF16 keeps every value finite and below 2.
    mask = int.from_bytes(b"\xff\xbf" * (1 << 19), "little")
    block = (int.from_bytes(random.Random(0).randbytes(1 << 20), "little") & mask).to_bytes(1 << 20, "little")
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for at in range(0, end, 1 << 20):
            turn = at >> 19 & 0xFFFFE
            out.write((block[turn:] + block[:turn])[: end - at])


def make_sharded(source: Path, dim: int) -> Path:
    """What torch's `HuggingFaceStorageWriter(save_distributed=True)` writes of a repository on 4 ranks, EP 2 x FSDP 2.

    Args:
        source: the repository.
        dim: dimension of the experts' matrices that FSDP divides: 0 gives rows, 1 columns. Other tensors are divided
            by rows over the four ranks.
    """
    sharded = source.with_name(f"{source.name}-{'columns' if dim else 'rows'}")
    if sharded.exists():
        return sharded
    making = _empty(source.with_name("making"))
    stored = open_checkpoint(source).store.tensors
    half = _experts(stored) // 2
    placed = {}
    for name, tensor in stored.items():
        ranks = range(4)
        if ".experts." in name:
            expert = int(name.split(".experts.")[1].split(".")[0])
            ranks = range(2) if expert < half else range(2, 4)
        over = dim if ".experts." in name else 0
        chunks = []
        for index, rank in enumerate(ranks):
            low, high = shard_range(tensor.shape[over], len(ranks), index)
            offsets, sizes = [0] * len(tensor.shape), list(tensor.shape)
            offsets[over], sizes[over] = low, high - low
            chunks.append((tuple(offsets), tuple(sizes), f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"))
        placed[name] = (DTYPES["BF16"], tensor.shape, chunks)
    target = plan_sharded(placed)
    for file, size in target.store.files.items():
        with open(making / file, "wb") as out:
            out.truncate(size)
    for frame in target.framing:
        with open(making / frame.file, "r+b") as out:
            out.seek(frame.position)
            out.write(frame.data)
    for name, tensor in target.store.tensors.items():
        (whole,) = stored[name].chunks
        values = np.memmap(source / whole.file, np.uint16, "r", whole.position, tensor.shape)
        for chunk in tensor.chunks:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            with open(making / chunk.file, "r+b") as out:
                out.seek(chunk.position)
                out.write(values[box].tobytes())
    shutil.copy(source / "config.json", making)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    mapping = {name: int(file.split("-")[1]) for name, file in index.items()}
    (making / "fqn_to_file_index_mapping.json").write_text(json.dumps(mapping))
    making.rename(sharded)
    return sharded


def make_saved(source: Path, kind: str, python: str) -> Path:
    """What a trainer saves of a repository on 4 ranks: `fsdp`, `verl` or `torchtitan` of `checkpoint_shards.py`.

    Args:
        source: the repository.
        kind: the trainer.
        python: an interpreter that has torch, safetensors and, for verl's tokenizer, transformers.
    """
    saved = source.with_name(f"{source.name}-{kind}")
    if not saved.exists():
        making = _empty(source.with_name("making"))
        script = Path(__file__).with_name("checkpoint_shards.py")
        subprocess.run([python, str(script), kind, str(source), str(making)], check=True)
        making.rename(saved)
    return saved


def _experts(names: Mapping[str, object]) -> int:
    return 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name)


def _empty(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
