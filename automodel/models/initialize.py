"""Fresh weights that depend on a seed and on the model, never on the mesh it is sharded over.

Every block of rows of every parameter has a random stream of its own, so that a process draws only the blocks that
meet its part, and the same model starts training from the same weights on one process or on a thousand.
"""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import nn

from automodel.models.causal_lm import NativeCausalLM, draw_fresh, fresh_constant
from automodel.parallel.local import LocalBox, local_boxes

_BLOCK_ELEMENTS = 1 << 16


@torch.no_grad()
def initialize(model: NativeCausalLM, seed: int | None = None) -> None:
    """Fill every parameter as transformers does: norms so that they change nothing, biases and padding with 0.

    The rest is drawn; what drives a state space or a decay has values of its own.

    Args:
        model: allocated, sharded or not; all processes of the mesh call this together.
        seed: None draws one from torch's generator, on the first process.
    """
    seed = agreed_seed() if seed is None else seed
    for box in local_boxes(model):
        prefix, _, name = box.name.rpartition(".")
        owner = model.get_submodule(prefix)
        constant = fresh_constant(owner, name)
        if constant is not None:
            box.tensor.fill_(constant)
        else:
            shape = model.get_parameter(box.name).shape
            _fill_random(box, tuple(shape), owner, model.config.initializer_range, seed)
            if isinstance(owner, nn.Embedding) and owner.padding_idx is not None:
                row = owner.padding_idx - box.offsets[0]
                if 0 <= row < box.tensor.shape[0]:
                    box.tensor[row] = 0.0


def _fill_random(box: LocalBox, shape: tuple[int, ...], owner: nn.Module, std: float, seed: int) -> None:
    rest = shape[1:]
    rows = max(1, _BLOCK_ELEMENTS // max(1, torch.Size(rest).numel()))
    inside = tuple(slice(o, o + n) for o, n in zip(box.offsets[1:], box.tensor.shape[1:], strict=True))
    first, last = box.offsets[0], box.offsets[0] + box.tensor.shape[0]
    for start in range(first // rows * rows, last, rows):
        generator = torch.Generator().manual_seed(_stream(seed, box.name, start))
        block = torch.empty(min(rows, shape[0] - start), *rest)
        draw_fresh(block, owner, box.name.rpartition(".")[2], std, generator)
        low, high = max(first, start), min(last, start + len(block))
        part = block[(slice(low - start, high - start), *inside)]
        box.tensor[low - first : high - first].copy_(part)


def _stream(seed: int, name: str, start: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {name} {start}".encode(), digest_size=7).digest(), "little")


def agreed_seed() -> int:
    """A seed drawn from torch's generator on the first process, the same on all of them."""
    seed = [int(torch.randint(2**62, ()))]
    if dist.is_initialized():
        dist.broadcast_object_list(seed, src=0)
    return seed[0]
