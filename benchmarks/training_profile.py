"""Where the time of a training step goes on the device: kinds of kernels, and communication that nothing covers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

COMMUNICATION = "communication"
KINDS = {
    COMMUNICATION: ("nccl", "barrier_kernel", "_spread_tokens", "_sum_for_peers", "_sum_own", "_publish"),
    "attention": ("sdpa", "fmha", "flash", "dot_do_o", "convert_dq", "_add_sinks"),
    "experts": (
        "quack",
        "enable_3x_kernel_for_sm9x",
        "_activate",
        "_gather_rows",
        "_spread_rows",
        "_sum_rows",
        "RadixSort",
    ),
    "loss": ("_softmax_gradient", "SoftMax"),
    "optimizer and gradient norm": ("_adamw", "multi_tensor_apply", "_square_sums"),
    "dense products": ("nvjet", "gemm", "cublas"),
    "norms, rope, residuals": ("triton_", "_norm_and_rotate"),
}
"""Kinds of work -> parts of the names of their CUDA kernels; the first that fits counts. The head is dense."""
OTHER = "other"
_NO_KERNELS = ("Optimizer.", "nccl:", "FSDP::", "ProfilerStep", "## ")
"""Annotations cover kernels that are listed themselves."""

STEPS = 2
"""That `profile` takes; other processes take as many meanwhile."""

Interval = tuple[float, float]


def kind_of(name: str) -> str:
    """The kind of work of a kernel."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times as intervals that neither meet nor overlap, in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def exposed(communication: Iterable[Interval], computation: Iterable[Interval]) -> float:
    """Time in which something of `communication` runs and nothing of `computation` does."""
    compute = merged(computation)
    both = merged([*merged(communication), *compute])
    return _length(both) - _length(compute)


def profile(step: Callable[..., Any], ids: Any, synchronize: Callable[[], None]) -> dict[str, Any]:
    """The second of two steps in a row under torch's profiler: milliseconds by kind of kernel, and of the kernels that
    take longest.

    `exposed_communication` is the time in which a kernel of NCCL or of the exchange through symmetric memory runs, its
    waiting for other processes included, and no other kernel; `idle` is that in which none runs, and `gaps` its longest
    parts.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        synchronize()
        begun = time.perf_counter()
        for _ in range(STEPS):
            step(ids)
        synchronize()
        elapsed = time.perf_counter() - begun
    kernels = [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in recorded.events()
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(_NO_KERNELS)
    ]
    return {"milliseconds_under_profiler": round(elapsed / STEPS * 1e3, 2), **summary(*second_half(kernels))}


def second_half(kernels: Iterable[tuple[str, Interval]]) -> tuple[list[tuple[str, Interval]], float | None]:
    """The later half of kernels, which is that of the second of two alike steps, and when the earlier half ended."""
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    half = len(ordered) // 2
    return ordered[half:], max((end for _, (_, end) in ordered[:half]), default=None)


def summary(kernels: Sequence[tuple[str, Interval]], since: float | None = None) -> dict[str, Any]:
    """What `profile` says of kernels, (name, begin and end in microseconds), after the moment `since`."""
    shares = dict.fromkeys([*KINDS, OTHER], 0.0)
    totals: dict[str, list[float]] = {}
    sides: dict[bool, list[Interval]] = {True: [], False: []}
    for name, (begin, end) in kernels:
        kind = kind_of(name)
        milliseconds = (end - begin) / 1e3
        shares[kind] += milliseconds
        total = totals.setdefault(name, [0.0, 0])
        total[0] += milliseconds
        total[1] += 1
        sides[kind == COMMUNICATION].append((begin, end))
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    gaps = _gaps(ordered, since if since is not None else ordered[0][1][0] if ordered else 0.0)
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:45]
    return {
        "milliseconds_by_kind": {kind: round(value, 2) for kind, value in shares.items()},
        "exposed_communication": round(exposed(sides[True], sides[False]) / 1e3, 2),
        "idle": round(sum(gap for gap, *_ in gaps), 2),
        "gaps": [[round(gap, 3), before[:60], after[:60]] for gap, before, after in gaps[:12]],
        "top": [[name[:90], round(total, 3), int(count)] for name, (total, count) in longest],
    }


def _gaps(kernels: Sequence[tuple[str, Interval]], since: float) -> list[tuple[float, str, str]]:
    """[milliseconds in which nothing ran, the kernel before, the one after], the longest first; of kernels in order."""
    found = []
    last, until = "", since
    for name, (begin, end) in kernels:
        if begin > until:
            found.append(((begin - until) / 1e3, last, name))
        if end > until:
            last, until = name, end
    return sorted(found, key=lambda gap: -gap[0])


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
