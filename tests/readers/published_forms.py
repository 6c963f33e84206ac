"""Quantised repositories in the form that DeepSeek, Qwen and OpenAI publish, written without a line of ckpt_tools.

`publish` turns a plain repository (FP32, as save_pretrained wrote it) into a quantised one, and the plain one into the
values that it stands for, rounded to BF16. Everything is computed in float64. Values are chosen so that quantising them
again gives the same files: what `ckpt consolidate --quantize` writes must equal them byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

FP8_BLOCK, FP8_MAX = 128, 448.0
FP8_NAMES = re.compile(r"\.(self_attn\.(?!.*norm)|mlp\.(?!gate\.)).*\.weight$")
"""Every matrix of a layer but the router."""
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
MXFP4_NAMES = re.compile(r"experts\.(gate_up|down)_proj$")
CONFIGS = {
    "fp8": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    },
    "mxfp4": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
}


def publish(plain: Path, published: Path, form: str) -> None:
    """Write `published`, tensors and config.json, and replace the tensors of `plain` by the values it stands for."""
    names, encode, decode = FORMS[form]
    tensors = load_file(plain / "model.safetensors")
    values: Tensors = {}
    files: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            values[name] = files[name] = tensor.float()
        elif names.search(name):
            once = decode(name, encode(name, tensor.double()))
            files |= encode(name, once.bfloat16().double())
            values[name] = decode(name, files).bfloat16().float()
        else:
            files[name] = tensor.bfloat16()
            values[name] = files[name].float()
    published.mkdir(parents=True)
    _save(values, plain)
    _save(files, published)
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": CONFIGS[form], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (published / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save(tensors: Tensors, folder: Path) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def _encode_fp8(name: str, weight: torch.Tensor) -> Tensors:
    """E4M3 `[rows, columns]` and F32 `weight_scale_inv`, one scale for each 128x128 block: its largest value is 448."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty([-(-size // FP8_BLOCK) for size in weight.shape], dtype=torch.float32)
    for row, top in enumerate(range(0, weight.shape[0], FP8_BLOCK)):
        for column, left in enumerate(range(0, weight.shape[1], FP8_BLOCK)):
            block = (slice(top, top + FP8_BLOCK), slice(left, left + FP8_BLOCK))
            scales[row, column] = weight[block].abs().max() / FP8_MAX
            scaled = (weight[block] / scales[row, column].double()).clamp(-FP8_MAX, FP8_MAX)
            codes[block] = scaled.to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scales}


def _decode_fp8(name: str, files: Tensors) -> torch.Tensor:
    codes, scales = files[name].double(), files[f"{name}_scale_inv"].double()
    spread = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return codes * spread[: codes.shape[0], : codes.shape[1]]


def _encode_mxfp4(name: str, weight: torch.Tensor) -> Tensors:
    """`blocks` `[E, out, in / 32, 16]`, low nibble first, and `scales` `[E, out, in / 32]` of `[E, in, out]`."""
    rows = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    power = torch.floor(torch.log2(rows.abs().amax(-1, keepdim=True))) - 2
    power += (rows.abs().amax(-1, keepdim=True) / 2**power) > 7  # would round beyond 6, the largest code
    scaled = rows / 2**power
    codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return {f"{name}_blocks": blocks, f"{name}_scales": (power.squeeze(-1) + 127).to(torch.uint8)}


def _decode_mxfp4(name: str, files: Tensors) -> torch.Tensor:
    blocks, scales = files[f"{name}_blocks"], files[f"{name}_scales"].double()
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    values = torch.cat([E2M1, -E2M1])[codes] * 2 ** (scales - 127)[..., None]
    return values.flatten(-2).transpose(1, 2)


Encode = Callable[[str, torch.Tensor], Tensors]
Decode = Callable[[str, Tensors], torch.Tensor]
FORMS: dict[str, tuple[re.Pattern[str], Encode, Decode]] = {
    "fp8": (FP8_NAMES, _encode_fp8, _decode_fp8),
    "mxfp4": (MXFP4_NAMES, _encode_mxfp4, _decode_mxfp4),
}
