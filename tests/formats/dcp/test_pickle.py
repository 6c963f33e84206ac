"""The inert pickle machine: it agrees with pickle on data, and runs nothing whatever the bytes say."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, StorageMeta

from ckpt_tools.core.errors import FormatError
from ckpt_tools.formats.dcp.description import ALLOWED, parse
from ckpt_tools.formats.dcp.inert import Global, Persistent, Record
from ckpt_tools.formats.dcp.pickle_reader import loads
from ckpt_tools.formats.dcp.pickle_writer import dumps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NUMBERS = st.integers(-(2**100), 2**100)
KEYS = st.text() | st.integers(-(2**60), 2**60)
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)

_forbidden: list[str] = []
_watching = False


def _audit(event: str, args: tuple[object, ...]) -> None:
    if _watching and event in (
        "import",
        "exec",
        "compile",
        "os.system",
        "subprocess.Popen",
        "open",
        "pickle.find_class",
    ):
        _forbidden.append(f"{event} {args!r}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[None]:
    """Fails when anything inside imports, compiles, runs or opens something."""
    global _watching  # noqa: PLW0603
    _forbidden.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert not _forbidden


class Calls:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


@settings(max_examples=60, deadline=None)
@given(PLAIN, st.sampled_from([2, 3, 4, 5]))
def test_plain_data_is_read_as_pickle_reads_it(value: object, protocol: int) -> None:
    assert loads(pickle.dumps(value, protocol=protocol), (), "x") == value


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_plain_data_is_written_as_pickle_reads_it(value: object) -> None:
    data = dumps(value)
    assert pickle.loads(data) == value
    assert loads(data, (), "x") == value
    assert max(code.proto for code, _, _ in pickletools.genops(data)) <= 2


def test_records_globals_and_references_survive_the_round_trip() -> None:
    kind = Global("torch", "Size")
    other = Global("torch.x", "Y")
    value = [Record(other, (1, Persistent(("storage", other))), {"a": kind}, new=True), Record(other, ("a",))]
    first, second = loads(dumps(value), {kind, other}, "x")  # type: ignore[misc]
    assert (first.kind, first.args[0], first.state, first.new) == (other, 1, {"a": kind}, True)
    assert first.args[1].pid == ("storage", other)
    assert (second.kind, second.args, second.new) == (other, ("a",), False)
    with pytest.raises(TypeError, match="cannot hold set"):
        dumps({1, 2})


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_metadata_of_every_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    state = {"w": torch.zeros(3, 2, dtype=torch.bfloat16), "nested": {"o": [1]}}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    document = dcp.FileSystemReader(tmp_path).read_metadata()
    document.storage_meta = StorageMeta(tmp_path, "save", "load", ["a"])
    found = parse(pickle.dumps(document, protocol=protocol), "x")
    assert found.tensors["w"].shape == (3, 2)
    assert found.tensors["w"].dtype.name == "BF16"
    assert found.blobs == ("nested.o",)


def malicious(root: Path) -> dict[str, bytes]:
    mark = f"touch {root / 'ran'}"
    metadata = Metadata({"w": ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))})
    metadata.planner_data = Calls(os.system, mark)
    nested = pickle.dumps(Calls(eval, f"__import__('os').system('{mark}')"), protocol=0)
    return {
        "os.system in a field": pickle.dumps(metadata),
        "builtins.eval": pickle.dumps(Calls(eval, "1"), protocol=2),
        "protocol 0": nested,
        "copyreg extension": b"\x80\x02\x82\x01.",
        "copyreg._reconstructor": pickle.dumps(Calls(collections.Counter, [mark]), protocol=1),
        "INST": b"(S'" + mark.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'x'\no.",
        "a call of a record": b"\x80\x02ctorch\nSize\n)\x81)R.",
        "a call of text": b"\x80\x02X\x01\x00\x00\x00a)R.",
        "NEWOBJ_EX": b"\x80\x04ctorch\nSize\n)}\x92.",
        "BUILD on a class": b"\x80\x02ctorch\nSize\n}b.",
        "BUILD on a list": b"\x80\x02]}b.",
        "BUILD twice": b"\x80\x02ctorch\nfloat32\n)R}b}b.",
        "SETITEM on a record": b"\x80\x02ctorch\nfloat32\n)RK\x01K\x02s.",
        "APPEND to a record": b"\x80\x02ctorch\nfloat32\n)RK\x01a.",
        "dotted global": b"\x80\x04\x8c\x05torch\x8c\x0cstorage.open\x93.",
        "global that is no text": b"\x80\x04K\x01K\x02\x93.",
        "number as key whose hash can be chosen": b"\x80\x02}\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x1fNs.",
        "list as key": b"\x80\x02}]K\x01s.",
        "deep tuple as key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
        "open marks": b"\x80\x02" + b"(" * 100_000 + b".",
        "huge number": b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
        "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "text beyond the end": b"\x80\x02X\xff\xff\xff\xffab.",
        "unknown memo": b"\x80\x02h\x07.",
        "nothing on the stack": b"\x80\x02.",
        "two values": b"\x80\x02K\x01K\x02.",
        "protocol 9": b"\x80\x09N.",
        "empty": b"",
    }


@pytest.mark.parametrize("name", sorted(malicious(Path())))
def test_a_hostile_pickle_is_refused_and_runs_nothing(name: str, tmp_path: Path) -> None:
    data = malicious(tmp_path)[name]
    with watched(), pytest.raises(FormatError, match="x: "):
        loads(data, ALLOWED, "x")
    assert not (tmp_path / "ran").exists()


def test_the_forbidden_global_is_named() -> None:
    with pytest.raises(FormatError, match=r"asks for posix\.system"):
        loads(pickle.dumps(Calls(os.system, "true")), ALLOWED, ".metadata")


def test_deep_nesting_and_shared_references_stay_small() -> None:
    deep = b"\x80\x02" + b"]" + b"]" * 500 + b"a" * 500 + b"."
    assert isinstance(loads(deep, (), "x"), list)
    laughs = b"\x80\x02)" + b"".join(b"q\x01h\x01h\x01\x87" if i else b"\x85" for i in range(200)) + b"."
    with watched():
        assert isinstance(loads(laughs, (), "x"), tuple)


def test_random_damage_is_refused_or_read_and_nothing_else(tmp_path: Path) -> None:
    dcp.save({"w": torch.zeros(3, 2), "o": {"x": 1}}, checkpoint_id=tmp_path, no_dist=True)
    whole = (tmp_path / ".metadata").read_bytes()
    choose = random.Random(0)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(choose.randint(1, 4)):
            data[choose.randrange(len(data))] = choose.randrange(256)
        with watched():
            try:
                parse(bytes(data), "x")
            except FormatError:
                continue


def test_a_persistent_id_is_kept_and_not_resolved() -> None:
    buffer = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", int(value)) if isinstance(value, float) else None

    Pickler(buffer, protocol=2).dump([1.5])
    (found,) = loads(buffer.getvalue(), (), "x")  # type: ignore[misc]
    assert found.pid == ("storage", 1)
