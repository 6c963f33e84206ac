"""Tensors inside `.distcp` files: what torch saved is located, what is framed here torch loads; damage is refused."""

from __future__ import annotations

import io
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch

from ckpt_tools.core.dtypes import BY_TORCH_NAME, DTYPES
from ckpt_tools.core.errors import FormatError, UsageError
from ckpt_tools.formats.dcp.blob import LocatedTensor, frame, locate
from tests.formats.build import bits, dtype_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FRAMED = [dtype for dtype in DTYPES.values() if dtype.torch_name and dtype.bits >= 8]


def put(path: Path, data: bytes, start: int = 0, after: bytes = b"") -> LocatedTensor:
    path.write_bytes(b"\xee" * start + data + after)
    fd = os.open(path, os.O_RDONLY)
    try:
        return locate(fd, start, len(data), path)
    finally:
        os.close(fd)


def saved(value: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("start", [0, 1, 5000])
@pytest.mark.parametrize("count", [0, 1, 7, 5000])
def test_a_saved_tensor_is_located_wherever_it_lies(tmp_path: Path, start: int, count: int) -> None:
    tensor = torch.randn(count)
    found = put(tmp_path / "a", saved(tensor), start, after=b"more")
    assert (found.dtype, found.sizes, found.strides) == (DTYPES["F32"], (count,), None)
    assert (tmp_path / "a").read_bytes()[found.position : found.position + 4 * count] == bits(tensor)


def test_a_view_of_a_larger_storage_keeps_offset_and_strides(tmp_path: Path) -> None:
    base = torch.arange(100, dtype=torch.int16).reshape(10, 10)
    found = put(tmp_path / "a", saved(base[2:8:2, 1:9:3]), 64)
    raw = (tmp_path / "a").read_bytes()
    assert (found.sizes, found.strides) == ((3, 3), (20, 3))
    assert int.from_bytes(raw[found.position : found.position + 2], "little") == 21
    assert put(tmp_path / "a", saved(base[2:3].t())).strides is None  # one column: row-major whatever its stride


def test_a_parameter_is_a_tensor(tmp_path: Path) -> None:
    assert put(tmp_path / "a", saved(torch.nn.Parameter(torch.zeros(2, 3)))).sizes == (2, 3)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"a": torch.zeros(1)}, "not a plain tensor"),
        ([1, 2], "not a plain tensor"),
        (torch.nn.Linear(1, 1), "asks for torch.nn"),
        (torch.zeros(2, dtype=torch.complex64).conj(), "attributes that are not understood"),
        (torch.zeros(3).to_sparse(), "asks for torch._utils._rebuild_sparse_tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_one_plain_tensor_is_refused(tmp_path: Path, value: object, fault: str) -> None:
    with pytest.raises(FormatError, match=fault):
        put(tmp_path / "a", saved(value))


def test_old_and_foreign_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no archive directory"):
        put(tmp_path / "a", saved(torch.zeros(9), _use_new_zipfile_serialization=False))
    for compression, fault in ((zipfile.ZIP_DEFLATED, "compressed"), (zipfile.ZIP_STORED, "has no data/0")):
        buffer = io.BytesIO()
        with (
            zipfile.ZipFile(io.BytesIO(saved(torch.zeros(400)))) as source,
            zipfile.ZipFile(buffer, "w", compression) as out,
        ):
            for name in source.namelist():
                if compression == zipfile.ZIP_DEFLATED or not name.endswith("data/0"):
                    out.writestr(name, source.read(name))
        with pytest.raises(FormatError, match=fault):
            put(tmp_path / "a", buffer.getvalue())


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_big_endian_and_repeated_records_are_refused(tmp_path: Path) -> None:
    data = saved(torch.zeros(4))
    with pytest.raises(FormatError, match="little-endian"):
        put(tmp_path / "a", data.replace(b"little", b"biggie"))
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/version", "4")
    with pytest.raises(FormatError, match="'version' twice"):
        put(tmp_path / "a", buffer.getvalue())


def test_a_record_that_claims_bytes_beyond_its_archive_is_refused(tmp_path: Path) -> None:
    around = frame(DTYPES["F32"], (200,), 0)
    data = bytearray(around.prefix + bytes(16) + around.suffix)
    data[-6:-2] = (len(around.prefix) + 16).to_bytes(4, "little")  # the directory lies where the end record says
    with pytest.raises(FormatError, match="'archive/data/0' is out of bounds"):
        put(tmp_path / "a", bytes(data), after=bytes(4096))


def test_truncation_at_any_byte_is_refused(tmp_path: Path) -> None:
    data = saved(torch.arange(10))
    for length in (*range(0, len(data), 13), *range(len(data) - 100, len(data))):
        with pytest.raises(FormatError):
            put(tmp_path / "a", data[:length])


@pytest.mark.parametrize("seed", range(4))
def test_damaged_records_are_refused_or_stay_in_bounds(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    data = saved(torch.arange(300, dtype=torch.int32)) if seed % 2 else whole(torch.arange(300, dtype=torch.int32), 0)
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(choose.randint(1, 6)):
            at = choose.choice([choose.randrange(900), len(data) - 1 - choose.randrange(700)])
            damaged[at] = choose.randrange(256)
        try:
            found = put(tmp_path / "a", bytes(damaged))
        except FormatError:
            continue
        strides = found.strides or torch.empty(found.sizes, device="meta").stride()
        last = sum((n - 1) * s for n, s in zip(found.sizes, strides, strict=True)) if 0 not in found.sizes else -1
        assert 0 <= found.position <= found.position + (last + 1) * found.dtype.itemsize <= len(data)


def whole(tensor: torch.Tensor, position: int) -> bytes:
    around = frame(dtype_of(tensor), tuple(tensor.shape), position)
    data = around.prefix + bits(tensor) + around.suffix
    assert around.data_position % 4096 == 0
    assert around.data_position == position + len(around.prefix)
    assert around.end == position + len(data)
    assert len(around.prefix) < 4096 + 1024
    assert len(around.suffix) < 512
    return data


@pytest.mark.parametrize("position", [0, 1, 3400, 4095, 4096, 10**12 + 7])
def test_a_framed_tensor_is_loaded_by_torch_and_located_by_us(tmp_path: Path, position: int) -> None:
    tensor = torch.randn(3, 5).to(torch.bfloat16)
    data = whole(tensor, position)
    assert torch.equal(torch.load(io.BytesIO(data), weights_only=True), tensor)
    if position < 10**6:
        found = put(tmp_path / "a", data, position)
        assert found.position % 4096 == 0
        assert (found.dtype, found.sizes, found.strides) == (DTYPES["BF16"], (3, 5), None)


@pytest.mark.parametrize("dtype", FRAMED, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0), (1,), (3, 2)])
def test_every_type_and_shape_is_framed(tmp_path: Path, dtype: object, shape: tuple[int, ...]) -> None:
    torch_dtype = getattr(torch, dtype.torch_name)  # type: ignore[attr-defined]
    size = torch.empty(shape).numel() * torch_dtype.itemsize
    tensor = torch.arange(size, dtype=torch.uint8).remainder(2).view(torch_dtype).reshape(shape) if size else None
    tensor = torch.empty(shape, dtype=torch_dtype) if tensor is None else tensor
    data = whole(tensor, 100)
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert (loaded.dtype, loaded.shape, bits(loaded)) == (tensor.dtype, tensor.shape, bits(tensor))
    assert put(tmp_path / "a", data, 100)[:2] == (BY_TORCH_NAME[str(torch_dtype)[6:]], shape)


def test_the_python_zip_reader_agrees() -> None:
    with zipfile.ZipFile(io.BytesIO(whole(torch.zeros(5), 0))) as archive:
        assert archive.namelist() == [f"archive/{n}" for n in ("data.pkl", "byteorder", "version", "data/0")]
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"


@pytest.mark.parametrize("gibibytes", [4, 5])
def test_beyond_4_gib_the_sizes_move_to_zip64_fields(tmp_path: Path, gibibytes: int) -> None:
    sizes = (gibibytes << 10, 1 << 20)
    around = frame(DTYPES["U8"], sizes, 0)
    path = tmp_path / "big"
    with path.open("wb") as file:  # sparse: takes no space
        file.write(around.prefix)
        file.seek(around.data_position + sizes[0] * sizes[1] - 1)
        file.write(b"\x07" + around.suffix)
    assert path.stat().st_size == around.end
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded.shape == sizes
    assert loaded[-1, -1] == 7
    fd = os.open(path, os.O_RDONLY)
    assert locate(fd, 0, around.end, path)[:4] == (DTYPES["U8"], sizes, around.data_position, None)
    os.close(fd)


@pytest.mark.parametrize("name", ["F6_E2M3", "F4"])
def test_types_without_a_torch_form_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot hold"):
        frame(DTYPES[name], (8,), 0)
