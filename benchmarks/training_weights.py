"""Random weights that every implementation of a model shares, made on each process's own device.

A leaf, which is a tensor of the Hugging Face repository, is drawn from a seed and its name; a parameter is put together
from leaves by its family's layout, one at a time, and each process keeps its part. So the whole model exists nowhere,
no file is read, and our parameters and transformers' hold the same values on any mesh, on devices of one kind.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from automodel.models.saving import layout_of
from automodel.parallel.local import local_boxes, tensors_by_name
from ckpt_tools.core.tensors import row_major
from ckpt_tools.families import family_of
from ckpt_tools.families.dialects import get_dialect
from ckpt_tools.layouts.layout import Layout, NativeTensor

SEED = 0
_STD = 0.02


def leaf_values(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A leaf: ones for a norm's weight, zeros for a bias, else normal with the spread of fresh models."""
    if name.endswith(("norm.weight", "norm_f.weight")):
        return torch.ones(shape, dtype=dtype, device=device)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype, device=device)
    seed = int.from_bytes(hashlib.blake2b(f"{SEED} {name}".encode(), digest_size=7).digest(), "little")
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, _STD, generator=generator)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Give every parameter of `model` its values: native or transformers' own, sharded or not, and allocated.

    Raises:
        ValueError: the model is of no known family, or has other names.
    """
    layout = _layout(model)
    leaves = {name: leaf.shape for name, leaf in layout.leaves.items()}
    for box in local_boxes(model):
        whole = _assembled(layout.native[box.name], leaves, box.tensor)
        inside = (slice(o, o + n) for o, n in zip(box.offsets, box.tensor.shape, strict=True))
        box.tensor.copy_(whole[tuple(inside)])


def _layout(model: nn.Module) -> Layout:
    """Of the model's family, in the names of the model: ours, or those that transformers 5 has in memory."""
    config, names = model.config.to_dict(), tensors_by_name(model).keys()
    layout, family = layout_of(model, config), family_of(config)
    if layout is None and family is not None:
        layout = family.layout(config, form="", names=names, dialect=get_dialect("transformers"))
    if layout is None or layout.native.keys() != names:
        raise ValueError(f"no layout fits the tensors of {type(model).__name__}")
    return layout


def _assembled(native: NativeTensor, leaves: dict[str, tuple[int, ...]], like: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter from its leaves, by the strided copies of its view."""
    values = {name: leaf_values(name, leaves[name], like.dtype, like.device) for name in native.leaves}
    whole = torch.empty(native.shape, dtype=like.dtype, device=like.device)
    strides = row_major(native.shape)
    for piece in native.view.pieces:
        sizes = [loop.size for loop in piece.loops]
        source = values[piece.leaf].as_strided(sizes, [loop.leaf_stride for loop in piece.loops], piece.leaf_start)
        start = sum(index * stride for index, stride in zip(piece.starts, strides, strict=True))
        target = whole.as_strided(sizes, [loop.step * strides[loop.dim] for loop in piece.loops], start)
        target.copy_(source)
    return whole
