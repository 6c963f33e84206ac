"""The names that transformers 5 holds in memory, as FSDP2 saves them (accelerate, TRL, axolotl): those of published
repositories, but for experts, which are stacked. Dense families and those that are published stacked have no others.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_tools.families.dialects.dialect import Dialect, Respell, is_over_experts, leaf_by_leaf
from ckpt_tools.layouts.rules import Rule


def _in_memory(published: str = "", held: str = "") -> Respell:
    """Stacked experts as our native layout has them, everything else leaf by leaf, with a part of the name changed."""

    def respell(rule: Rule) -> Iterator[Rule]:
        if is_over_experts(rule):
            yield rule
        else:
            yield from leaf_by_leaf(rule, lambda template: template.replace(published, held) if published else template)

    return respell


DIALECTS = (
    Dialect(
        name="transformers",
        title="transformers 5 in memory",
        families={
            "deepseek_v3": _in_memory(),
            "mixtral": _in_memory("block_sparse_moe.", "mlp."),
            "nemotron_h": _in_memory("backbone.", "model."),
            "qwen3_5_moe": _in_memory(),
            "qwen3_moe": _in_memory(),
            "qwen3_next": _in_memory(),
        },
    ),
)
