"""The values that a pickle is read into and written from: plain data, and records that stand for objects.

A record remembers which class or function a pickle asks for and with what; nothing is ever imported or called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


class _NoState:
    """Marks a record that has no state; None is a state."""

    __slots__ = ()


NO_STATE: Final = _NoState()


@dataclass(frozen=True, slots=True)
class Global:
    """A module attribute that a pickle names, for example `Global("torch", "bfloat16")`."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """What would be `kind(*args)` followed by `__setstate__(state)`. Compared and hashed by identity.

    Attributes:
        kind: class or function.
        args: positional arguments.
        state: what the BUILD instruction sets, `NO_STATE` when there is none.
        new: made by `kind.__new__` (NEWOBJ) and not by a call (REDUCE).
    """

    kind: Global
    args: tuple[object, ...] = ()
    state: object = NO_STATE
    new: bool = False

    def fields(self) -> dict[str, object]:
        """The state as attributes; empty when there is none or it is no dictionary with string keys."""
        if isinstance(self.state, dict) and all(isinstance(key, str) for key in self.state):
            return self.state
        return {}


@dataclass(slots=True, eq=False)
class Persistent:
    """A reference to something beside the pickle (torch.save: the storage), by its persistent id."""

    pid: object


SIZE: Final = Global("torch", "Size")
ORDERED_DICT: Final = Global("collections", "OrderedDict")
