"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from ckpt_tools.core.errors import UsageError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS.update({f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power, _letter: 1000**_power})


def parse_size(text: str | int) -> int:
    """Bytes of `5GB` (powers of 1000, as Hugging Face counts), `512MiB` (powers of 1024) or a plain number.

    Raises:
        UsageError: it is not a size, or not positive.
    """
    if isinstance(text, int):
        size = text
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
        if found is None or found[2].upper() not in _UNITS:
            raise UsageError(f"{text!r} is not a size", hint="examples: 5GB, 512MiB, 1000000")
        size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size <= 0:
        raise UsageError(f"the size {text!r} is not positive")
    return size


def format_size(size: float) -> str:
    """Bytes as text with three digits: `61.1 GB`."""
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:,.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
