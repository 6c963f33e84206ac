"""TransformerEngine on CPUs: fixtures that put the stand-in where the package would be, and let CPUs through."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from automodel import attention_backends, backends, expert_backends
from automodel.kernels import measured, packages, te

PATH = Path(__file__).parent / "stand_ins"
CUDNN = 91900


@contextmanager
def te_on_cpus() -> Iterator[pytest.MonkeyPatch]:
    """Obstacles of the device are none; those of the package are asked of the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _loaded():
            patch.delitem(sys.modules, name)
        _forget()
        patch.syspath_prepend(PATH)
        patch.setattr(torch.backends.cudnn, "version", lambda: CUDNN)
        for module in (te, backends, expert_backends):
            patch.setattr(module, "te_obstacle", lambda device, dtype: te.package_obstacle())  # noqa: ARG005
        patch.setattr(attention_backends, "_capability", lambda device: (9, 0))  # noqa: ARG005
        yield patch
        for name in _loaded():
            del sys.modules[name]
    _forget()


def fp8_pays_for_small_layers(patch: pytest.MonkeyPatch) -> None:
    """As if FP8 had been measured to win for weights of 32 x 32 and larger, from 16 tokens on."""
    patch.setitem(measured.FP8_WINS, "fp8", ((16, 32, 32),))
    patch.setitem(measured.FP8_WINS, "fp8_block", ((128, 128, 128),))


@pytest.fixture
def stand_in() -> Iterator[pytest.MonkeyPatch]:
    """TransformerEngine's stand-in where the package would be."""
    with te_on_cpus() as patch:
        yield patch


@pytest.fixture
def fp8_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 that pays for small layers."""
    fp8_pays_for_small_layers(monkeypatch)


def _loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]


def _forget() -> None:
    te._import.cache_clear()
    packages._found.cache_clear()
    packages._release.cache_clear()
