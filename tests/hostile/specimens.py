"""A small whole checkpoint in every format, to be damaged, and what one of them holds, to be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import xxhash

from ckpt_tools import consolidate, convert
from ckpt_tools.engine.checkpoint import open_checkpoint
from ckpt_tools.engine.verify import leaf_digests, verify_structure
from tests.checkpoints import make_repository

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 16,
    "mlp_only_layers": [],
}
MESH = "dp_shard=2,ep=2"


def _source(root: Path, family: str = "qwen3_moe", **config: object) -> Path:
    return make_repository(root / "source", family, **{**TINY, "num_experts": 2, **config})


def _single(root: Path) -> Path:
    convert(_source(root), root / "native")
    consolidate(root / "native", root / "made")
    return root / "made"


def _sharded(root: Path) -> Path:
    convert(_source(root), root / "native")
    consolidate(root / "native", root / "made", max_shard_size=1500)
    return root / "made"


def _whole(root: Path) -> Path:
    convert(_source(root), root / "made")
    return root / "made"


def _mesh(root: Path) -> Path:
    convert(_source(root), root / "made", mesh=MESH)
    return root / "made"


def _sharded_safetensors(root: Path) -> Path:
    convert(_source(root), root / "made", mesh=MESH, file_format="safetensors")
    return root / "made"


def _fp8(root: Path) -> Path:
    convert(_source(root), root / "native")
    consolidate(root / "native", root / "made", quantize="fp8")
    return root / "made"


def _mxfp4(root: Path) -> Path:
    source = _source(root, "gpt_oss", num_local_experts=2, hidden_size=32, intermediate_size=32)
    convert(source, root / "native")
    consolidate(root / "native", root / "made", quantize="mxfp4")
    return root / "made"


def _trained(root: Path) -> Path:
    """As training saves it: a manifest that has the digests of blobs and none of tensors."""
    made = _mesh(root)
    store = open_checkpoint(made).store
    blobs: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in store.tensors.values():
        for chunk in tensor.chunks:
            length = tensor.dtype.nbytes(chunk.numel)
            data = (made / chunk.file).read_bytes()[chunk.position : chunk.position + length]
            blobs.setdefault(chunk.file, []).append((chunk.position, length, xxhash.xxh3_128_hexdigest(data)))
    manifest = json.loads((made / "ckpt-manifest.json").read_text())
    del manifest["tensors"]
    (made / "ckpt-manifest.json").write_text(json.dumps({**manifest, "blobs": blobs}))
    return made


SPECIMENS: dict[str, Callable[[Path], Path]] = {
    "hf": _single,
    "hf sharded": _sharded,
    "hf fp8": _fp8,
    "hf mxfp4": _mxfp4,
    "dcp": _whole,
    "dcp of a mesh": _mesh,
    "sharded safetensors": _sharded_safetensors,
    "training save": _trained,
}


def contents(root: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Dtype, shape and digest of the stored bytes of every leaf; raises what opening a damaged checkpoint raises."""
    checkpoint = open_checkpoint(root)
    verify_structure(checkpoint)
    dtypes, leaves = checkpoint.leaf_dtypes(), checkpoint.layout.leaves
    found = leaf_digests(checkpoint, leaves, threads=1, progress=None)
    return {name: (dtypes[name].name, leaves[name].shape, digest) for name, digest in found.items()}


def payload(root: Path) -> list[tuple[str, int, int]]:
    """(file, position, length) of the bytes of tensors."""
    tensors = open_checkpoint(root).store.tensors.values()
    return [(c.file, c.position, t.dtype.nbytes(c.numel)) for t in tensors for c in t.chunks if c.numel]


def structure(root: Path) -> list[tuple[str, int]]:
    """(file, position) of every byte that says where tensors are: headers, archives, metadata, index.

    Zeros that pad a blob to its boundary are left out; they are bytes of no meaning, thousands of them.
    """
    places = []
    own: dict[str, list[tuple[int, int]]] = {}
    for file, position, length in payload(root):
        own.setdefault(file, []).append((position, length))
    for file, spans in own.items():
        data = bytearray((root / file).read_bytes())
        for position, length in spans:
            data[position : position + length] = bytes(length)
        places += [(file, position) for position, byte in enumerate(data) if byte]
    for name in (".metadata", "model.safetensors.index.json"):
        if (root / name).exists():
            places += [(name, position) for position in range((root / name).stat().st_size)]
    return places
