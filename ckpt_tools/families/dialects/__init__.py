"""The naming dialects of other trainers. A module of this package with a `DIALECTS` tuple adds its dialects."""

from __future__ import annotations

from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.names import nearest
from ckpt_tools.families.dialects import nemo_automodel, torchtitan, torchtune, transformers
from ckpt_tools.families.dialects.dialect import Dialect

OURS = ("hf", "native")
"""The names of published repositories and of native checkpoints, which every family has."""

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for module in (transformers, torchtitan, nemo_automodel, torchtune)
    for dialect in module.DIALECTS
}


def get_dialect(name: str) -> Dialect:
    """The dialect called `name`.

    Raises:
        UsageError: no such dialect; the message names the nearest.
    """
    if name not in DIALECTS:
        known = (*OURS, *DIALECTS)
        raise UsageError(
            f"there is no dialect {name!r}", hint=f"did you mean {nearest(name, known) or ', '.join(known)}?"
        )
    return DIALECTS[name]
