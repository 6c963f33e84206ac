"""One file a family: its layout, as data. A file in this folder is a family; `layout_for` finds that of a config."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.names import nearest
from ckpt_tools.families.family import Family
from ckpt_tools.layouts.layout import Layout

_SHARED = frozenset({"decoder", "delta_net", "dialects", "family", "readers"})
"""Modules that families are composed of."""
FAMILIES = tuple(sorted(module.name for module in iter_modules(__path__) if module.name not in _SHARED))
"""Names of the families, each a module of this package; none is imported before it is asked for."""


def get_family(name: str) -> Family:
    """The family called `name`.

    Raises:
        UsageError: no such family; the message names the nearest.
    """
    if name not in FAMILIES:
        raise UsageError(
            f"there is no family {name!r}",
            hint=f"did you mean {nearest(name, FAMILIES) or ' or '.join(FAMILIES)}? `ckpt families` lists them",
        )
    family: Family = import_module(f"{__name__}.{name}").FAMILY
    return family


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family that a config belongs to by its `model_type`, or None where there is none."""
    model_type = config.get("model_type")
    for name in FAMILIES:
        family = get_family(name)
        if model_type in family.model_types:
            return family
    return None


def layout_for(config: Mapping[str, Any]) -> Layout | None:
    """The layout of a config's family, or None where the names stay as they are on disk."""
    family = family_of(config)
    return None if family is None else family.layout(config)
