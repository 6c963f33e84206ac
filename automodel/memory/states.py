"""Parameters as a mesh cuts them, by layer: what a process holds, and what FSDP2 gathers and reduces besides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ckpt_tools.engine.sharding import ShardingMesh, boxes
from ckpt_tools.families import layout_for

KEPT_GATHERED_BYTES = 2 << 30
"""What `parallelize` keeps gathered unless it is told."""

_IN_FLIGHT = 3
"""Layers' worth of parameters that FSDP2 has beside the shards where it frees them after use: those that run, the next
ones, and the buffer that these were gathered in."""

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class States:
    """Bytes of parameters.

    Attributes:
        held: of each layer, by the process that holds most in all.
        root_held: of what is outside of the layers, by the same process.
        whole: what FSDP2 gathers of each layer: all but experts that are divided over processes; 0 in one process.
        experts: what FSDP2 gathers of each layer's divided experts, where `dp_shard` cuts them too.
        root_whole: what it gathers outside of the layers.
        keeps: layers of which it gathers no more than this together stay gathered from forward to backward.
    """

    held: tuple[int, ...]
    root_held: int
    whole: tuple[int, ...]
    experts: tuple[int, ...]
    root_whole: int
    keeps: int = KEPT_GATHERED_BYTES

    @classmethod
    def of(
        cls, config: Mapping[str, Any], mesh: ShardingMesh, itemsize: int, keeps: int = KEPT_GATHERED_BYTES
    ) -> States:
        """Those of a config's layout on a mesh; experts are divided where `ep` is above 1."""
        layout = layout_for(config)
        if layout is None:
            raise ValueError("a config of no known family")
        layers = len(layout.layers)
        ranks = [[0] * (layers + 1) for _ in range(mesh.ranks)]
        whole, experts = [0] * (layers + 1), [0] * layers
        for tensor in layout.native.values():
            found = _LAYER.search(tensor.name)
            layer = int(found[1]) if found else layers
            divided = mesh.ep > 1 and tensor.name in layout.stacked
            for rank, _, sizes in boxes(tensor.shape, mesh, stacked=tensor.name in layout.stacked):
                ranks[rank][layer] += prod(sizes) * itemsize
            if divided and mesh.dp_shard > 1:
                experts[layer] += prod(tensor.shape) * itemsize // mesh.ep
            elif not divided and mesh.ranks > 1:
                whole[layer] += prod(tensor.shape) * itemsize
        most = max(ranks, key=sum)
        return cls(tuple(most[:-1]), most[-1], tuple(whole[:-1]), tuple(experts), whole[-1], keeps)

    @property
    def total(self) -> int:
        """Of the process that holds most."""
        return sum(self.held) + self.root_held

    def gathered(self, layers: int) -> int:
        """What layers have gathered when the first `layers` have run and their backward passes have not."""
        experts = _IN_FLIGHT * max(self.experts)
        if sum(self.whole) <= self.keeps:
            return sum(self.whole[:layers]) + experts
        return _IN_FLIGHT * max(self.whole) + experts

    def reducing(self, layer: int) -> int:
        """A layer's gradients on their way to their shards: whole, and in the buffer that they are added up from."""
        return 2 * (self.whole[layer] + self.experts[layer])
