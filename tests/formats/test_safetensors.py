"""The strict safetensors reader and the header planner, judged by the reference library."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.core.dtypes import BY_TORCH_NAME, DTYPES
from ckpt_tools.core.errors import FormatError, NotFoundError, UsageError
from ckpt_tools.formats.safetensors import plan_file, read_header


def write(path: Path, header: object, data: bytes = b"", pad: int = 0) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "U8", shape: object = (4,), span: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def test_header_of_the_reference_writer_is_read_with_absolute_positions(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "longs": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "matrix": torch.randn(3, 5),
    }
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    raw = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert header.size == len(raw)
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert found.shape == tuple(tensor.shape)
        assert found.dtype is BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
        bits = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert raw[found.position : found.position + found.nbytes] == bits


@pytest.mark.parametrize(
    ("header", "data", "fault"),
    [
        (b'[{"a": 1}]', b"", "does not start with"),
        (b' {"a": 1}', b"", "does not start with"),
        (b"{", b"", "not valid JSON"),
        (b'{"a\xff": 1}', b"", "not valid JSON"),
        (b'{"a":' + b"[" * 10_000, b"", "not valid JSON"),
        (b'{"a":' + b"[" * 100_000, b"", "more JSON values than"),
        (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', b"", "number -0"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[1' + b"0" * 4000 + b",0]}}", b"", "not described by"),
        ({"w": entry(shape=[1 << 40, 1 << 40, 0], span=(0, 0))}, b"", "impossible number of elements"),
        ({"__metadata__": {"a": "\ud800"}}, b"", "half of a character"),
        (b'{"a":{"dtype":"U8","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,4]}}', b"", "not valid JSON"),
        (b'{"a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}}', b"abcd", "number 4.0"),
        (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', b"abcd", "number NaN"),
        (
            b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
            b"abcd",
            "'a' twice",
        ),
        ({"": entry()}, b"abcd", "not a usable tensor name"),
        ({"a\x00b": entry()}, b"abcd", "not a usable tensor name"),
        ({"a\ud800": entry()}, b"abcd", "not a usable tensor name"),
        ({"x" * 2000: entry()}, b"abcd", "not a usable tensor name"),
        ({"w": entry("BF61")}, b"abcd", "unknown dtype 'BF61'"),
        ({"w": entry(shape=[-4])}, b"abcd", "'w' is not described by"),
        ({"w": entry(shape=[True, 4])}, b"abcd", "'w' is not described by"),
        ({"w": entry(shape=[1] * 65)}, b"abcd", "'w' is not described by"),
        ({"w": entry(span=[0, 2, 4])}, b"abcd", "'w' is not described by"),
        ({"w": {**entry(), "more": 1}}, b"abcd", "'w' is not described by"),
        ({"w": entry(shape=[1 << 40, 1 << 40])}, b"abcd", "impossible number of elements"),
        ({"w": entry(shape=[5])}, b"abcd", "needs 5 bytes and its data_offsets span 4"),
        ({"w": entry("F4", [3], [0, 1])}, b"a", "needs 1.5 bytes"),
        ({"w": entry(span=[4, 0])}, b"abcd", "span -4"),
        ({"a": entry(), "b": entry(span=[2, 6])}, b"abcdef", "'b' overlaps 'a'"),
        ({"a": entry(), "b": entry(span=[5, 9])}, b"abcdefghi", "'b' leaves a hole after 'a'"),
        ({"a": entry(span=[1, 5])}, b"abcde", "leaves a hole after 'the header'"),
        ({"a": entry()}, b"abc", "truncated"),
        ({"a": entry()}, b"abcde", "1 bytes after the last tensor"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map strings to strings"),
        ({"__metadata__": []}, b"", "__metadata__ must map strings to strings"),
        (entry(), b"", "one tensor description"),
    ],
)
def test_a_broken_rule_is_refused_and_named(tmp_path: Path, header: object, data: bytes, fault: str) -> None:
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert fault in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x02\0\0\0", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 3) + b"{}"]
)
def test_a_length_field_that_cannot_be_true_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"too short|limit is|truncated"):
        read_header(path)


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(7), "b": torch.ones(2, 3)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            read_header(path)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match=r"not a file|not a regular file"):
        read_header(tmp_path)


def test_planned_file_is_read_by_the_reference_library_and_by_us(tmp_path: Path) -> None:
    tensors = {
        "odd_bytes": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(-0.0, dtype=torch.float64),
        "page": torch.randn(2048).to(torch.bfloat16),
        "flag": torch.tensor([True]),
        "empty": torch.zeros(3, 0),
        "pages": torch.arange(1024),
        "matrix": torch.randn(3, 5),
        "fp8": torch.randn(7).to(torch.float8_e5m2),
        "été": torch.tensor([float("nan")]),
    }
    described = {
        name: (BY_TORCH_NAME[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for name, t in tensors.items()
    }
    header, positions, size = plan_file(described, {"format": "pt"})
    path = tmp_path / "a.safetensors"
    content = bytearray(size)
    content[: len(header)] = header
    for name, tensor in tensors.items():
        if tensor.numel():
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            content[positions[name] : positions[name] + len(data)] = data
    path.write_bytes(content)

    assert len(header) % 4096 == 0
    assert positions["page"] % 4096 == positions["pages"] % 4096 == 0
    assert positions["page"] < positions["pages"] < positions["odd_bytes"]
    ours = read_header(path)
    loaded = load_file(path)
    assert ours.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert ours.tensors[name][:3] == (*described[name], positions[name])
        assert positions[name] % max(1, described[name][0].bits // 8) == 0
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_every_dtype_of_the_format_is_planned_and_read_back(tmp_path: Path) -> None:
    described = {dtype.name: (dtype, (8,)) for dtype in DTYPES.values()}
    header, positions, size = plan_file(described, {})
    path = tmp_path / "all.safetensors"
    path.write_bytes(header + bytes(size - len(header)))
    found = read_header(path).tensors
    assert {name: (e.dtype, e.shape, e.position) for name, e in found.items()} == {
        name: (*described[name], positions[name]) for name in described
    }


@pytest.mark.parametrize("name", ["__metadata__", "", "line\nbreak"])
def test_a_name_that_readers_refuse_is_not_written(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        plan_file({name: (DTYPES["U8"], (1,))}, {})


def test_45_000_tensors_are_planned_and_read_in_time_linear_in_their_number(tmp_path: Path) -> None:
    described = {
        f"model.layers.{i // 768}.mlp.experts.{i % 256}.part{i % 3}.{i}": (DTYPES["BF16"], (2, i % 7))
        for i in range(45_000)
    }
    started = time.process_time()
    header, _, size = plan_file(described, {})
    path = tmp_path / "many.safetensors"
    path.write_bytes(header + bytes(size - len(header)))
    found = read_header(path)
    assert time.process_time() - started < 3
    assert len(found.tensors) == 45_000
    assert sum(e.nbytes for e in found.tensors.values()) == sum(2 * prod(shape) for _, shape in described.values())


def test_a_header_of_millions_of_entries_is_refused(tmp_path: Path) -> None:
    entries = b",".join(b'"%07d":"0123456789"' % i for i in range(1_000_001))
    path = write(tmp_path / "bomb.safetensors", b'{"__metadata__":{' + entries + b"}}")
    with pytest.raises(FormatError, match="more JSON values than"):
        read_header(path)


def test_a_22_mib_header_costs_a_fraction_of_what_it_costs_elsewhere(tmp_path: Path) -> None:
    one = '"%06d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    count = (22 << 20) // (len(one % 0) + 1)
    path = write(tmp_path / "bomb.safetensors", ("{" + ",".join(one % i for i in range(count)) + "}").encode())
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from ckpt_tools.formats.safetensors import read_header\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read_header(Path(sys.argv[1]))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 300, f"{run.stdout.strip()} MiB for a header of 22 MiB"
