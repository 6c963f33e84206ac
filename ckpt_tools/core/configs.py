"""The line between an untrusted config.json and the code that computes with its fields.

Families read some sixty fields, each in its own way. Rather than checking the kind of each field at each place, what
Python raises over a field of another kind is turned into an error of the config here, and fields that count things
are bounded before anything is made for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from ckpt_tools.core.errors import LayoutError

MAX_LAYERS: Final = 4096
MAX_EXPERTS: Final = 16384
_COUNTS: Final = {
    **dict.fromkeys(("num_hidden_layers", "num_nextn_predict_layers"), MAX_LAYERS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), MAX_EXPERTS),
}
MAX_TENSORS: Final = 1 << 18
"""Layers times experts; the largest published models have under 2^15."""


@contextmanager
def config_errors() -> Iterator[None]:
    """Raises `LayoutError` for what a config's fields make Python raise inside; usable as a decorator."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise LayoutError(
            f"config.json: a field has a value of the wrong kind, or one that fits no model ({error})",
            hint="the config is damaged or belongs to something else; fetch it again",
        ) from error


def check_counts(config: Mapping[str, object]) -> None:
    """Raises `LayoutError` when a config counts more layers or experts than any model has."""
    for name, limit in _COUNTS.items():
        value = config.get(name)
        if isinstance(value, int | float) and not value <= limit:
            raise LayoutError(f"config.json: {name} is {str(value)[:40]}; no model has more than {limit:,}")
