"""The names of NeMo AutoModel's own models in memory (0.7.0): those of published repositories, but for experts, which
are stacked with inputs before outputs. Its checkpointer saves published names; these are in a plain `dcp.save`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckpt_tools.families.dialects.dialect import Dialect, interleaved, is_over_experts, leaf_by_leaf, respelled
from ckpt_tools.layouts.rules import Rule, Transpose

EXPERTS = {"gate_up_proj": "mlp.experts.gate_and_up_projs", "down_proj": "mlp.experts.down_projs"}
"""`components/moe/experts.py`: `gate_and_up_projs` [experts, hidden, 2 * width] and `down_projs` [experts, width,
hidden]."""


def _respell(rule: Rule) -> Iterator[Rule]:
    module, _, name = rule.native.rpartition("mlp.experts.")
    stored = EXPERTS.get(name) if module else None
    if stored and (is_over_experts(rule) or rule.stacked):
        yield respelled(rule, module + stored, Transpose(interleaved(rule.value)))
    else:
        yield from leaf_by_leaf(rule, lambda template: template.replace("mlp.router.", "mlp.gate."))


DIALECTS = (
    Dialect(
        name="nemo-automodel",
        title="NeMo AutoModel in memory",
        families=dict.fromkeys(("deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_moe"), _respell),
    ),
)
