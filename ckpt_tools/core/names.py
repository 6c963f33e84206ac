"""Tensor names: the nearest valid one for an error message, and templates with named axes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache

_FIELD = re.compile(r"\{(\w+)\}")
_MAX_LENGTH = 200
MAX_NAME_LENGTH = 1024
"""Characters of a tensor's name."""


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate closest to `name` in spelling, or None when nothing is close."""
    # difflib is quadratic in length, too: keep the pool small for checkpoints of 100,000 tensors.
    if len(name) > _MAX_LENGTH:
        return None
    pool = [candidate for candidate in candidates if len(candidate) <= _MAX_LENGTH]
    if len(pool) > 2000:
        words = set(re.split(r"[._]", name))
        pool.sort(key=lambda c: -len(words & set(re.split(r"[._]", c))))
        pool = pool[:200]
    found = difflib.get_close_matches(name, pool, n=1, cutoff=0.5)
    return found[0] if found else None


def fields(template: str) -> tuple[str, ...]:
    """Names of the axes in a template: `model.layers.{layer}.weight` has `("layer",)`."""
    return tuple(dict.fromkeys(_FIELD.findall(template)))


def fill(template: str, **indices: int) -> str:
    """The template with the axes that are given replaced by their index; other axes stay."""
    for axis, index in indices.items():
        template = template.replace(f"{{{axis}}}", str(index))
    return template


@lru_cache(maxsize=256)
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(re.escape(part) for part in _FIELD.split(template)[::2]))


def match(template: str, name: str) -> bool:
    """Whether `name` is the template with some index in place of each axis."""
    return _pattern(template).fullmatch(name) is not None
