"""The training half: drop-in auto classes with native mixture-of-experts models, sharded over a device mesh.

Names are imported when they are first used, so that `import automodel` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from automodel.auto import (
        NeMoAutoModelForCausalLM,
        NeMoAutoModelForImageTextToText,
        NeMoAutoModelForSequenceClassification,
        NeMoAutoModelForTextToWaveform,
    )
    from automodel.backends import Backend, BackendReport
    from automodel.parallel.mesh import MeshConfig
    from automodel.tokenizer import NeMoAutoTokenizer

_HOMES = {
    "Backend": "automodel.backends",
    "BackendReport": "automodel.backends",
    "MeshConfig": "automodel.parallel.mesh",
    "NeMoAutoModelForCausalLM": "automodel.auto",
    "NeMoAutoModelForImageTextToText": "automodel.auto",
    "NeMoAutoModelForSequenceClassification": "automodel.auto",
    "NeMoAutoModelForTextToWaveform": "automodel.auto",
    "NeMoAutoTokenizer": "automodel.tokenizer",
}

__all__ = [
    "Backend",
    "BackendReport",
    "MeshConfig",
    "NeMoAutoModelForCausalLM",
    "NeMoAutoModelForImageTextToText",
    "NeMoAutoModelForSequenceClassification",
    "NeMoAutoModelForTextToWaveform",
    "NeMoAutoTokenizer",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
