"""Lets SGLang import on a machine without CUDA: empty modules in place of torchvision and sgl_kernel.

SGLang imports both at module level and calls neither on the CPU text path. Every call into a stub is recorded in
`CALLS`, so that a check can state that none took part in a result. Import this module before `sglang`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator, Sequence

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# transformers decides at import whether torchvision exists: it must look before the stub is there.
import transformers.image_utils
import transformers.modeling_utils  # noqa: F401
from transformers.utils.import_utils import is_torchvision_available

is_torchvision_available()

STUBBED = ("torchvision", "sgl_kernel")
CALLS: list[str] = []


class Stub:
    """A name from a stubbed module: any attribute, base class or decorator, and a recorded call."""

    def __init__(self, *_: object, stub_name: str = "", **__: object) -> None:
        self._stub_name = stub_name

    def __call__(self, *_: object, **__: object) -> Stub:
        if self._stub_name:
            CALLS.append(self._stub_name)
        return Stub()

    def __getattr__(self, name: str) -> Stub:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub(stub_name=f"{self._stub_name}.{name}" if self._stub_name else "")

    def __iter__(self) -> Iterator[Stub]:
        return iter(())

    def __or__(self, other: object) -> object:
        return other

    __ror__ = __or__


class StubModule(types.ModuleType):
    """A package whose every attribute exists: classes for capitalised names, `Stub` for the others."""

    __path__: list[str] = []
    __version__ = "0.0"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (Stub,), {}) if name[:1].isupper() else Stub(stub_name=f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stubbed packages and all their submodules."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".", maxsplit=1)[0] in STUBBED:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.insert(0, StubFinder())
