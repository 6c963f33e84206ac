"""How several processes divide one plan: whether it is the same in all, which tasks are whose, and which are done."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from hashlib import sha256

from ckpt_tools.engine.execute import Task
from ckpt_tools.engine.plan import Plan
from ckpt_tools.formats.remote import remote_files
from ckpt_tools.version import TOOL


def agreement(plan: Plan) -> str:
    """Identifies what a plan reads and writes: the same on all machines, wherever and whenever files were put there."""
    source, target = plan.source.store, plan.target.store
    state = sha256(repr((TOOL, plan.side, sorted(source.files.items()), sorted(target.files.items()))).encode())
    remote = remote_files(plan.source.root)
    state.update(repr(remote and (remote.url, remote.versions)).encode())
    for copy in plan.copies:
        ends = [(end.dtype.name, end.itemsize, *end.first()) for end in (copy.source, copy.target) if end is not None]
        state.update(repr((copy.name, copy.items, ends)).encode())
    return state.hexdigest()


def share_of(tasks: Sequence[Task], rank: int, world: int) -> list[Task]:
    """Consecutive tasks with one of `world` equal parts of the bytes to move; each task is in one rank's share."""
    total = sum(map(_weight, tasks))
    low, high = total * rank // world, total * (rank + 1) // world
    mine, position = [], 0
    for task in tasks:
        if low <= position + _weight(task) // 2 < high:
            mine.append(task)
        position += _weight(task)
    return mine


def _weight(task: Task) -> int:
    return max(1, task.nbytes)


def packed(tasks: Sequence[Task]) -> str:
    """The tasks' numbers: one bit each, compressed, as text."""
    bits = bytearray(1 + max((task.number for task in tasks), default=0) // 8)
    for task in tasks:
        bits[task.number // 8] |= 1 << task.number % 8
    return base64.b64encode(zlib.compress(bits)).decode()


def unpacked(text: str) -> set[int]:
    bits = zlib.decompress(base64.b64decode(text))
    return {8 * place + bit for place, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1}
