"""Writes planned files the slow and obvious way, so that the tests can hand them to the reference libraries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ckpt_tools.core.dtypes import BY_TORCH_NAME, DType
from ckpt_tools.core.tensors import Store, TargetFiles


def dtype_of(tensor: torch.Tensor) -> DType:
    return BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]


def bits(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order, bit for bit."""
    tensor = tensor.detach().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def materialize(target: TargetFiles, root: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Every planned file under `root`; fails when two planned ranges overlap or one leaves its file."""
    root.mkdir(parents=True, exist_ok=True)
    contents = {file: bytearray(size) for file, size in target.store.files.items()}
    written = {file: np.zeros(size, dtype=bool) for file, size in target.store.files.items()}

    def put(file: str, position: int, data: bytes) -> None:
        span = slice(position, position + len(data))
        assert span.stop <= len(contents[file]), f"{file}: byte {span.stop} is past the end"
        assert not written[file][span].any(), f"{file}: byte {position} is written twice"
        contents[file][span] = data
        written[file][span] = True

    for frame in target.framing:
        put(frame.file, frame.position, frame.data)
    for name, stored in target.store.tensors.items():
        for chunk in stored.chunks:
            assert chunk.strides is None
            box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            put(chunk.file, chunk.position, bits(tensors[name][box]))
    for file, content in {**contents, **target.documents}.items():
        (root / file).write_bytes(content)
    return root


def read_back(store: Store, name: str) -> torch.Tensor:
    """A stored tensor, from its chunks alone; fails when chunks leave elements unwritten."""
    stored = store.tensors[name]
    dtype = getattr(torch, str(stored.dtype.torch_name))
    result = torch.zeros(stored.shape, dtype=dtype)
    seen = torch.zeros(stored.shape, dtype=torch.uint8)
    itemsize = stored.dtype.itemsize
    for chunk in stored.chunks:
        box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        raw = (store.root / chunk.file).read_bytes()[chunk.position :]
        strides = chunk.strides or torch.empty(chunk.sizes, device="meta").stride()
        if chunk.numel:
            last = sum((size - 1) * stride for size, stride in zip(chunk.sizes, strides, strict=True)) + 1
            flat = torch.frombuffer(bytearray(raw[: last * itemsize]), dtype=torch.uint8).view(dtype)
            result[box] = flat.as_strided(chunk.sizes, strides)
        seen[box] += 1
    assert bool((seen == 1).all()), f"{name}: an element is in no chunk or in two"
    return result
