"""Tiny quantised repositories for tests, made and decoded with none of the engine: codes, scales, float64 values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ckpt_tools.core.dtypes import DTYPES, DType
from ckpt_tools.families import get_family
from ckpt_tools.formats import hf
from ckpt_tools.layouts.encodings import ENCODINGS
from tests.checkpoints import CONFIGS, tensor_bytes, write_repository

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FORMS = {
    "qwen3_moe": "fp8",
    "qwen3_next": "fp8",
    "qwen3_5_moe": "fp8",
    "qwen3_5": "fp8",
    "deepseek_v3": "fp8",
    "minimax_m2": "fp8",
    "gpt_oss": "mxfp4",
}
"""The form that each family is best known in."""
FP8_FAMILIES = ("deepseek_v3", "llama", "mixtral", "qwen2", "qwen3", "qwen3_moe")
ALL_FORMS = [
    *((family, form) for family in FP8_FAMILIES for form in ("fp8", "fp8-channel", "fp8-tensor")),
    *((family, "fp8") for family in ("qwen3_next", "qwen3_5_moe", "qwen3_5", "minimax_m2")),
    ("gpt_oss", "mxfp4"),
]
WIDE = {"hidden_size": 160, "intermediate_size": 200}
"""Neither is a multiple of 128: blocks at the edges are ragged."""
# Queries, keys and values of a leaf end within blocks.
DELTA_NET = {"hidden_size": 160, "linear_key_head_dim": 40, "linear_value_head_dim": 35, "intermediate_size": 200}
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama", "mixtral", "qwen2", "qwen3"), WIDE),
    "qwen3_moe": {**WIDE, "moe_intermediate_size": 136},
    "deepseek_v3": {**WIDE, "moe_intermediate_size": 136, "kv_lora_rank": 130},
    "qwen3_next": {**DELTA_NET, "moe_intermediate_size": 136},
    "qwen3_5_moe": {**DELTA_NET, "shared_expert_intermediate_size": 136},
    "qwen3_5": DELTA_NET,
    "minimax_m2": {"hidden_size": 160, "intermediate_size": 136},
    "gpt_oss": {},
}
MODELOPT = {"quant_algo": "FP8", "quant_method": "modelopt"}


def make_quantised(
    root: Path,
    family: str,
    form: str | None = None,
    *,
    seed: int = 0,
    scale_dtype: str = "F32",
    beside: tuple[str, ...] = (),
    quantization: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A repository in one of the family's quantised forms with random codes, NaN among them, and sensible scales.

    Args:
        root: directory to make.
        family, form: which; the family's best known form by default.
        seed: of codes and scales.
        scale_dtype: of FP8 scales.
        beside: F32 scalars to put there as well, by name.
        quantization: config.json's `quantization_config` where it is another than the form's.
        changes: to the config.
    """
    form = form or FORMS[family]
    config = {**CONFIGS[family], **SIZES[family], **changes}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    # No layout writes a scale for a tensor: those tensors that have one for each row take its place.
    layout = get_family(family).layout(config, form="fp8-channel" if form == "fp8-tensor" else form)
    described = MODELOPT if form == "fp8-tensor" else get_family(family).quantization_config(config, layout)
    config["quantization_config"] = quantization or dict(described or {})
    tensors: dict[str, tuple[DType, tuple[int, ...]]] = dict.fromkeys(beside, (DTYPES["F32"], ()))
    for leaf in layout.leaves.values():
        if leaf.encoding is None:
            tensors[leaf.name] = (DTYPES["F32" if leaf.keep_dtype else "BF16"], leaf.shape)
        else:
            for part in ENCODINGS[form].parts(leaf.name, leaf.shape):
                dtype = DTYPES[scale_dtype] if part.dtype.name == "F32" else part.dtype
                tensors[part.name] = (dtype, part.shape)
    source = write_repository(root, tensors, config, max_shard_size=10**9, seed=seed)
    rng = np.random.default_rng(seed)
    for name, (dtype, shape) in tensors.items():
        if name.endswith(("weight_scale_inv", "weight_scale")):
            values = rng.uniform(1e-3, 1, shape).astype(np.float32)
            overwrite(source, name, (values if dtype.name == "F32" else values.astype(ml_dtypes.bfloat16)).tobytes())
        elif name.endswith("_scales"):
            overwrite(source, name, rng.integers(110, 130, shape, dtype=np.uint8).tobytes())
    return source


def overwrite(root: Path, name: str, data: bytes) -> None:
    """Puts other bytes in the place of a tensor's."""
    chunk = hf.open_repository(root).store.tensors[name].chunks[0]
    with open(root / chunk.file, "r+b") as file:
        file.seek(chunk.position)
        file.write(data)


def fp8_reference(codes: bytes, scales: bytes, shape: tuple[int, ...]) -> bytes:
    """BF16 bytes of an FP8 tensor in blocks, rounded from float64 through FP32."""
    blocks = tuple(-(-n // 128) for n in shape)
    factors = np.frombuffer(scales, np.float32).reshape(blocks).astype(np.float64)
    factors = factors.repeat(128, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]]
    return as_bf16(E4M3[np.frombuffer(codes, np.uint8).reshape(shape)] * factors)


def as_bf16(values: np.ndarray) -> bytes:
    """BF16 bytes of float64 values, rounded through FP32 as kernels do."""
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).tobytes()


def decoded(root: Path) -> dict[str, np.ndarray]:
    """Float64 values of every quantised FP8 tensor of a repository, by name."""
    stored, store = tensor_bytes(root), hf.open_repository(root).store
    found = {}
    for name in (name for name, tensor in store.tensors.items() if tensor.dtype.name == "F8_E4M3"):
        shape = store.tensors[name].shape
        scale = next(part for part in (f"{name}_scale_inv", f"{name}_scale") if part in stored)
        kind = np.float32 if store.tensors[scale].dtype.name == "F32" else ml_dtypes.bfloat16
        factors = np.frombuffer(stored[scale], kind).astype(np.float64)
        if scale.endswith("_inv"):
            grid = factors.reshape(store.tensors[scale].shape)
            factors = grid.repeat(128, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]]
        else:
            factors = factors.reshape(-1, 1)
        found[name] = E4M3[np.frombuffer(stored[name], np.uint8).reshape(shape)] * factors
    return found


def config_of(root: Path) -> dict[str, Any]:
    """Content of a repository's config.json."""
    found: dict[str, Any] = json.loads((root / "config.json").read_bytes())
    return found
