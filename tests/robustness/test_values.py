"""Values and sizes at the edges: every dtype, NaN payloads, no elements, more than 2^31 of them, files beyond 4 GiB.

What is written is read back with a parser of this file's own, so that a mistake in ours does not hide itself.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckpt_tools import consolidate, convert, plan, verify
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import CkptError
from ckpt_tools.engine import bounds, copy, execute, files
from ckpt_tools.engine.execute import Outcome, Task
from tests.checkpoints import make_repository, write_repository
from tests.robustness.scenarios import tree

PACKED = tuple(name for name, dtype in DTYPES.items() if dtype.bits < 8)
SHAPES = ((), (0, 8), (8,), (3, 8), (2, 3, 16))
SPECIAL = {
    "F16": ("<H", (0x8000, 0x7C01, 0xFE55, 0x7C00, 0x0001)),
    "BF16": ("<H", (0x8000, 0x7F81, 0xFFD5, 0x7F80, 0x0001)),
    "F32": ("<I", (0x80000000, 0x7F800001, 0xFFC12345, 0x7F800000, 0x00000001)),
    "F64": ("<Q", (1 << 63, 0x7FF0000000000001, 0xFFF8123456789ABC, 0x7FF << 52, 1)),
}
"""-0.0, a signalling NaN, a quiet one with a payload, infinity and the smallest subnormal, as bits."""


def tensors_of(root: Path) -> dict[str, tuple[str, tuple[int, ...], Path, int, int]]:
    """Dtype, shape, file, position and size of every tensor, from the headers."""
    found = {}
    for path in sorted(root.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                low, high = entry["data_offsets"]
                found[name] = (entry["dtype"], tuple(entry["shape"]), path, 8 + length + low, high - low)
    return found


def values_of(root: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name, (dtype, shape, path, position, size) in tensors_of(root).items():
        with open(path, "rb") as file:
            found[name] = (dtype, shape, os.pread(file.fileno(), size, position))
    return found


def _every_dtype(root: Path, *, but: tuple[str, ...] = ()) -> Path:
    tensors = {
        f"{name}.{number}": (dtype, shape)
        for name, dtype in DTYPES.items()
        for number, shape in enumerate(SHAPES)
        if name not in but and (dtype.bits % 8 == 0 or shape)
    }
    source = write_repository(root, tensors, {"model_type": "unheard-of"})
    for name, (_, _, path, position, size) in tensors_of(source).items():
        code, bits = SPECIAL.get(name.split(".")[0], ("<B", ()))
        packed = b"".join(struct.pack(code, value) for value in bits)
        if 0 < len(packed) <= size:
            with open(path, "r+b") as file:
                os.pwrite(file.fileno(), packed, position)
    return source


@pytest.mark.parametrize("file_format", ["dcp", "safetensors"])
@pytest.mark.parametrize("mesh", [None, "dp_shard=3"])
def test_every_dtype_and_every_bit_pattern_comes_back(tmp_path: Path, file_format: Any, mesh: str | None) -> None:
    # DCP has no types narrower than a byte, and a third of eight of them does not end between two bytes.
    source = _every_dtype(tmp_path / "source", but=PACKED if file_format == "dcp" or mesh else ())
    convert(source, tmp_path / "native", file_format=file_format, mesh=mesh)
    consolidate(tmp_path / "native", tmp_path / "back")
    assert values_of(tmp_path / "back") == values_of(source)
    verify(tmp_path / "native", against=source)


def test_dtypes_that_dcp_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    assert PACKED == ("F4", "F6_E2M3", "F6_E3M2")
    for name in PACKED:
        source = write_repository(tmp_path / name, {"w": (DTYPES[name], (8,))}, {"model_type": "unheard-of"})
        with pytest.raises(CkptError, match=name):
            convert(source, tmp_path / "native")
        assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("dtype", SPECIAL)
def test_a_family_moves_bits_and_not_numbers(tmp_path: Path, dtype: str) -> None:
    source = make_repository(tmp_path / "source", "qwen3_moe", dtype=dtype)
    code, bits = SPECIAL[dtype]
    generator = random.Random(0)
    for _, _, path, position, size in tensors_of(source).values():
        width = struct.calcsize(code)
        packed = b"".join(struct.pack(code, generator.choice(bits)) for _ in range(size // width))
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), packed, position)
    convert(source, tmp_path / "native", mesh="dp_shard=2,ep=2")
    consolidate(tmp_path / "native", tmp_path / "back")
    assert values_of(tmp_path / "back") == values_of(source)


@pytest.mark.parametrize("verb", ["convert dcp", "convert safetensors", "consolidate"])
def test_one_thread_eight_and_a_second_run_write_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr("ckpt_tools.engine.plan.SEGMENT", 1024)
    source = make_repository(tmp_path / "source")
    if verb == "consolidate":
        convert(source, tmp_path / "native", mesh="dp_shard=2,ep=2")
    trees = []
    for number, threads in enumerate((1, 8, 8, None)):
        out = tmp_path / f"out{number}"
        if verb == "consolidate":
            consolidate(tmp_path / "native", out, threads=threads)
        else:
            convert(source, out, file_format=verb.split()[1], threads=threads, mesh="dp_shard=2")  # type: ignore[arg-type]
        trees.append(tree(out))
    assert "ckpt-manifest.json" in trees[0]
    assert all(other == trees[0] for other in trees[1:])


LARGE = {
    "bytes": (DTYPES["U8"], ((1 << 31) + 12_345,)),
    "matrix": (DTYPES["BF16"], (40_000, 30_000)),
    "last": (DTYPES["F32"], (1000,)),
}
"""More than 2^31 elements; 2.4 GB that end beyond 4 GiB of the file; a tensor that begins there."""


def _sparse_repository(root: Path) -> dict[str, dict[int, bytes]]:
    """A repository of holes with 64 bytes here and there: at the ends, around 2^31 and 4 GiB; their places by name."""
    root.mkdir()
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in LARGE.items():
        size = dtype.nbytes(shape[0] * (shape[1] if len(shape) > 1 else 1))
        header[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    start = 8 + len(text)
    generator = random.Random(3)
    marks: dict[str, dict[int, bytes]] = {}
    path = root / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + end)
        for name, entry in header.items():
            low, high = entry["data_offsets"]
            around = (1 << 31, 1 << 32, (1 << 32) - start - low, (1 << 31) - start - low)
            places = {0, high - low - 64, *(p - 32 for p in around if 32 <= p < high - low - 64)}
            marks[name] = {place: generator.randbytes(64) for place in places}
            for place, data in marks[name].items():
                os.pwrite(file.fileno(), data, start + low + place)
    (root / "config.json").write_text('{"model_type": "unheard-of"}')
    return marks


@contextmanager
def only_marked_segments(marks: dict[str, dict[int, bytes]]) -> Iterator[list[Task]]:
    """Copies the segments that hold a mark; what is left out stays a hole, as it is in the source."""
    real, done = execute.run_task, []

    def marked(task: Task, *rest: Any) -> Outcome:
        width = task.copy.source.itemsize
        low, high = task.low * width, task.high * width
        if not any(low < place + 64 and place < high for place in marks[task.copy.name]):
            return Outcome(bytes(16), True)
        done.append(task)
        return real(task, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "run_task", marked)
        # Holes take no room, and stay holes.
        patch.setattr(bounds, "check_disk", lambda *_: None)
        patch.setattr(files, "_allocate", lambda *_: None)
        yield done


@pytest.mark.parametrize("file_format", ["dcp", "safetensors"])
def test_tensors_beyond_2_to_the_31_elements_and_offsets_beyond_4_gib(
    tmp_path: Path, file_format: Any, full: bool
) -> None:
    marks = _sparse_repository(tmp_path / "source")
    assert any(place >= 1 << 31 for places in marks.values() for place in places)
    with only_marked_segments(marks) as done:
        convert(tmp_path / "source", tmp_path / "native", file_format=file_format, max_file_size="100GB")
        consolidate(tmp_path / "native", tmp_path / "back", family="identity", max_shard_size="100GB")
    assert len(done) >= 2 * sum(map(len, marks.values())) // 2
    found = tensors_of(tmp_path / "back")
    assert {name: entry[:2] for name, entry in found.items()} == {n: (d.name, s) for n, (d, s) in LARGE.items()}
    assert max(position + size for *_, position, size in found.values()) > 1 << 32
    for name, places in marks.items():
        _, _, path, position, size = found[name]
        with open(path, "rb") as file:
            for place, data in places.items():
                assert os.pread(file.fileno(), 64, position + place) == data, (name, place)
            # Just before a mark is a hole: nothing came twice or shifted.
            assert not any(os.pread(file.fileno(), 64, position + size // 3))
    if full:
        convert(tmp_path / "source", tmp_path / "whole", file_format=file_format, max_file_size="100GB")
        verify(tmp_path / "whole", against=tmp_path / "source")
        # 5 GB that nobody looks at later.
        shutil.rmtree(tmp_path / "whole")


MEASURED = """
import resource, sys
from ckpt_tools import consolidate, convert, plan
verb, source, out, memory, threads = sys.argv[1:]
kind = {"convert": dict(mesh="dp_shard=2"), "consolidate": {}}[verb]
run = {"convert": convert, "consolidate": consolidate}[verb]
# Everything is imported and planned, so that what comes on top are the buffers.
bound = run(source, "", memory=memory, threads=int(threads), dry_run=True, **kind).memory
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
run(source, out, memory=memory, threads=int(threads), **kind)
print(bound, peak() - before)
"""


def _large(root: Path, family: str) -> Path:
    """Tensors of up to 32 MB."""
    size = {"vocab_size": 500_000, "intermediate_size": 1024, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    return make_repository(root, family, **size)


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
@pytest.mark.parametrize("threads", [1, 4])
def test_buffers_stay_within_the_bound_that_the_plan_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, threads: int
) -> None:
    """gpt_oss transposes and interleaves, which takes segments instead of windows."""
    source = _large(tmp_path / "source", family)
    peaks: list[int] = []

    def measured(*arguments: Any, **options: Any) -> execute.Executed:
        tracemalloc.start()
        try:
            return execute.execute(*arguments, **options)
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    monkeypatch.setattr(copy, "execute", measured)
    there = convert(source, tmp_path / "native", threads=threads, mesh="dp_shard=2")
    again = consolidate(tmp_path / "native", tmp_path / "back", threads=threads)
    for peak, report in zip(peaks, (there, again), strict=True):
        # What else Python allocates meanwhile: tasks, digests, the modules of the kernels.
        assert peak <= report.memory + (2 << 20), f"{peak:,} bytes, planned were {report.memory:,}"


def test_a_process_grows_by_no_more_than_the_plan_states(tmp_path: Path) -> None:
    source = _large(tmp_path / "source", "gpt_oss")
    convert(source, tmp_path / "native")
    for verb, path in (("convert", source), ("consolidate", tmp_path / "native")):
        command = [sys.executable, "-c", MEASURED, verb, str(path), str(tmp_path / verb), "130MiB", "4"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_ARENA_MAX": "1"}
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert ran.returncode == 0, ran.stderr
        bound, grown = map(int, ran.stdout.split())
        # Stacks of threads, modules that only a copy imports, and the allocator's own.
        assert grown <= bound + (12 << 20), f"{grown:,} bytes, planned were {bound:,}"


def test_the_plan_states_no_more_memory_than_was_given(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source")
    for memory in ("4MiB", "9MB", "64MiB"):
        assert (
            plan(source, memory=memory, threads=16).memory
            <= {"4MiB": 4 << 20, "9MB": 9_000_000, "64MiB": 64 << 20}[memory]
        )
