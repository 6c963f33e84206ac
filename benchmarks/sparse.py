"""Real-sized checkpoints without their data: true headers, indices and `.metadata`, and holes in place of tensors.

`python -m benchmarks.sparse DeepSeek-V3 DIRECTORY` makes one. Everything that works from headers alone (opening,
planning, proving, the verbs that look) meets the size that it has in the world, in a few megabytes of disk.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ckpt_tools.core.dtypes import DTYPES, DType
from ckpt_tools.core.sizes import parse_size
from ckpt_tools.engine.checkpoint import open_checkpoint
from ckpt_tools.engine.sharding import parse_mesh
from ckpt_tools.engine.targets import NativeFormat, plan_native
from ckpt_tools.families import family_of
from ckpt_tools.layouts.layout import Layout

DEEPSEEK_V3: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN3_30B_A3B: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MODELS = {"DeepSeek-V3": DEEPSEEK_V3, "Qwen3-30B-A3B": QWEN3_30B_A3B}
MAX_FILE_SIZE = "4.25GB"
"""Of a published file: it cuts DeepSeek-V3 in FP8 into 163 files, as its publisher has it."""


def sparse_repository(
    root: Path, config: Mapping[str, Any], *, form: str = "", max_file_size: str | int = MAX_FILE_SIZE
) -> Path:
    """A repository as published ones are: packed files in the order of the names, an index and a config.

    Args:
        root: directory to make; one that is there is taken as it is.
        config: content of config.json.
        form: quantised form of the tensors, such as `fp8`; empty for BF16.
        max_file_size: bytes of tensors in a file.
    """
    if root.exists():
        return root
    root.mkdir(parents=True)
    family = family_of(config)
    if family is None:
        raise ValueError(f"{config.get('model_type')} is of no known family")
    layout = family.layout(config, form=form)
    files: list[dict[str, tuple[DType, tuple[int, ...]]]] = [{}]
    filled, limit = 0, parse_size(max_file_size)
    for name, dtype, shape in _stored(layout):
        nbytes = dtype.nbytes(prod(shape))
        if filled and filled + nbytes > limit:
            files.append({})
            filled = 0
        files[-1][name] = dtype, shape
        filled += nbytes
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):06d}.safetensors"
        _write_packed(root / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    (root / "config.json").write_text(json.dumps(dict(config), indent=2))
    return root


def sparse_native(
    source: Path, root: Path, *, mesh: str | None = None, file_format: NativeFormat = "dcp", max_file_size: str = "5GB"
) -> Path:
    """The native checkpoint that `ckpt convert --dequantize` makes of a repository, without its manifest.

    Args:
        source: the repository.
        root: directory to make; one that is there is taken as it is.
        mesh: such as `dp_shard=8,ep=8`; None for whole tensors.
        file_format: `dcp` or `safetensors`.
        max_file_size: size of a file when no mesh is given.
    """
    if root.exists():
        return root
    plan = plan_native(
        open_checkpoint(source),
        mesh=None if mesh is None else parse_mesh(mesh),
        file_format=file_format,
        dtype=None,
        max_file_size=parse_size(max_file_size),
    )
    (root / "hf").mkdir(parents=True)
    (root / "hf" / "config.json").write_bytes((source / "config.json").read_bytes())
    descriptors: dict[str, int] = {}
    for file, size in plan.target.store.files.items():
        descriptors[file] = os.open(root / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.ftruncate(descriptors[file], size)
    for frame in plan.target.framing:
        os.pwrite(descriptors[frame.file], frame.data, frame.position)
    for descriptor in descriptors.values():
        os.close(descriptor)
    for name, data in plan.target.documents.items():
        (root / name).write_bytes(data)
    return root


def _stored(layout: Layout) -> Iterator[tuple[str, DType, tuple[int, ...]]]:
    for name in sorted(layout.leaves):
        leaf = layout.leaves[name]
        if leaf.encoding is None:
            yield name, DTYPES["F32" if leaf.keep_dtype else "BF16"], leaf.shape
        else:
            yield from ((part.name, part.dtype, part.shape) for part in leaf.encoding.parts(name, leaf.shape))


def _write_packed(path: Path, tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> None:
    """A safetensors file with a dense header and a hole of the size of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.nbytes(prod(shape))
        header[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def main() -> None:
    """Makes one model's repository, and its native checkpoint where a format or a mesh is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--form", default="", help="fp8, or nothing for BF16")
    parser.add_argument("--max-file-size", default=MAX_FILE_SIZE)
    parser.add_argument("--native", type=Path, help="also make a native checkpoint there")
    parser.add_argument("--mesh", help="of the native checkpoint")
    arguments = parser.parse_args()
    source = sparse_repository(
        arguments.directory, MODELS[arguments.model], form=arguments.form, max_file_size=arguments.max_file_size
    )
    if arguments.native:
        sparse_native(source, arguments.native, mesh=arguments.mesh)


if __name__ == "__main__":
    main()
