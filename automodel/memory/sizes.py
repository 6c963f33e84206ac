"""What a step computes on, as numbers: the sizes of a model's layers and of one process's micro-batch.

Legend of the package: N tokens of a process, D hidden, H heads, G kv heads, d head_dim, F MLP or expert width,
E experts, K experts a token, V vocabulary, s bytes of an element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ckpt_tools.core.errors import UsageError
from ckpt_tools.families import family_of

Implementation = Literal["native", "transformers", "transformers-compiled"]
Checkpointing = bool | Literal["selective"]

FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "qwen3", "qwen2", "llama")
"""Families of the formulas: attention with grouped heads, and a gated MLP or experts."""


@dataclass(frozen=True)
class Step:
    """What one process does in a step.

    Attributes:
        batch: sequences of a micro-batch.
        sequence: tokens of each.
        checkpointing: layers keep their input alone and run again in the backward pass; `selective`: what lies between
            the input of a native layer and its attention runs again.
        implementation: `native`, with its fastest kernels; transformers' own class with grouped products and SDPA; or
            that with compiled layers.
    """

    batch: int
    sequence: int
    checkpointing: Checkpointing = False
    implementation: Implementation = "native"


@dataclass(frozen=True)
class Sizes:
    """Sizes by the letters of the legend, in lower case; `kinds` says of each layer whether it has experts."""

    n: int
    d: int
    heads: int
    query: int
    key_value: int
    width: int
    dense_width: int
    e: int
    k: int
    v: int
    s: int
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any], step: Step, itemsize: int) -> Sizes:
        """The sizes that a config says.

        Raises:
            UsageError: its family's layers are not those of the formulas.
        """
        family = family_of(config)
        if family is None or family.name not in FAMILIES:
            raise UsageError(
                f"memory is not estimated for {config.get('model_type')}", hint=f"known are {', '.join(FAMILIES)}"
            )
        if family.name == "gpt_oss" and step.implementation == "transformers":
            raise UsageError(
                "memory is not estimated for transformers' GPT-OSS, whose attention keeps all scores",
                hint="transformers-compiled stands for it with FlexAttention",
            )
        shape = family.shape(config)
        sizes = shape.sizes
        return cls(
            n=step.batch * step.sequence,
            d=sizes["hidden"],
            heads=sizes["query_heads"],
            query=sizes["query"],
            key_value=sizes["key_value"],
            width=sizes.get("expert_width", 0),
            dense_width=sizes["mlp_width"],
            e=shape.experts,
            k=config.get("num_experts_per_tok") or 0,
            v=sizes["vocab"],
            s=itemsize,
            kinds=shape.layers,
        )
