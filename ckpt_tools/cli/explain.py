"""`ckpt explain`: what a tensor is called on the other side of the layout, and how it is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from ckpt_tools.cli import options
from ckpt_tools.cli.output import Output
from ckpt_tools.cli.text import aligned, names_of

if TYPE_CHECKING:
    from ckpt_tools.engine.describe import Explanation

EXAMPLES = (
    "ckpt explain ./Qwen3-30B-A3B model.layers.0.self_attn.qkv_proj.weight",
    "ckpt explain ./Qwen3-30B-A3B model.layers.0.mlp.experts.7.up_proj.weight",
)
_SHOWN = 12
"""Counterparts that are listed before the rest is only counted; a layer can have hundreds of experts."""


def explain(
    path: options.AnyCheckpoint,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a tensor, on either side of the layout.")],
    family: options.Family = None,
    dialect: options.Dialect = None,
    like: options.Like = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a tensor is on the other side of the layout.

    Names the tensors that it is made of or goes to, their shapes, and the rule.
    """
    from ckpt_tools import api

    explanations = api.explain(path, name, family=family, dialect=dialect, like=like)
    lines = (line for explanation in explanations for line in _lines(explanation))
    Output(json, quiet).show({"explanations": explanations}, lines)


def _lines(explanation: Explanation) -> Iterator[str]:
    side = names_of(explanation.side)
    verb = "goes to" if explanation.side == "hf" else "made of"
    yield from aligned(
        (
            ("name", f"{explanation.name} {list(explanation.shape)}"),
            ("side", side),
            ("rule", explanation.rule),
            (verb, ""),
        )
    )
    shown = explanation.counterparts[:_SHOWN]
    yield from (f"  {line}" for line in aligned((name, str(list(shape))) for name, shape in shown))
    if len(explanation.counterparts) > _SHOWN:
        yield f"  ... and {len(explanation.counterparts) - _SHOWN:,} more (--json lists all)"
