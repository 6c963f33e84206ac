"""No pickle and no Python file of a checkpoint runs, wherever it lies. Watched by an audit hook in another process."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert
from ckpt_tools.core.errors import FormatError
from ckpt_tools.formats.dcp.description import (
    ALLOWED,
    BYTES,
    CHUNK,
    INDEX,
    METADATA,
    PROPERTIES,
    STORAGE_INFO,
    TENSOR,
    parse,
)
from ckpt_tools.formats.dcp.inert import ORDERED_DICT, SIZE, Global, Persistent, Record
from ckpt_tools.formats.dcp.pickle_reader import loads
from ckpt_tools.formats.dcp.pickle_writer import dumps
from tests.checkpoints import make_repository
from tests.hostile.gadgets import gadgets
from tests.hostile.watched import Watched

NAMES = [gadget.name for gadget in gadgets(Path("mark"))]


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    process = Watched()
    yield process
    process.close()


def test_there_are_gadgets_of_every_class() -> None:
    assert len(NAMES) == len(set(NAMES)) >= 100


def test_gadgets_run_when_pickle_opens_them(tmp_path: Path) -> None:
    """Each in a process of its own would cost a minute; one process opens all, and each has its own mark."""
    program = (
        "import sys, pickle, contextlib\n"
        "from pathlib import Path\n"
        "for path in sorted(Path(sys.argv[1]).glob('*.pkl')):\n"
        "    with contextlib.suppress(Exception):\n"
        "        pickle.loads(path.read_bytes())\n"
    )
    live = [name for name, _, runs in gadgets(tmp_path) if runs]
    for number, name in enumerate(live):
        data = next(g.data for g in gadgets(tmp_path / f"{number:03d}.ran") if g.name == name)
        (tmp_path / f"{number:03d}.pkl").write_bytes(data)
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)
    straw = [name for number, name in enumerate(live) if not (tmp_path / f"{number:03d}.ran").exists()]
    assert len(live) > 30
    assert not straw


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_refuses_a_gadget_or_makes_plain_data_of_it(tmp_path: Path, name: str) -> None:
    _, data, live = next(g for g in gadgets(tmp_path / "ran") if g.name == name)
    if live:
        with pytest.raises(FormatError):
            loads(data, ALLOWED, "x")
    for act in (lambda: loads(data, ALLOWED, "x"), lambda: parse(data, "x")):
        try:
            act()
        except FormatError as error:
            assert len(str(error)) < 2000  # noqa: PT017
    with pytest.raises(FormatError):
        parse(data, "x")
    assert not (tmp_path / "ran").exists()


def dcp(root: Path, archive: bytes, kind: Global = TENSOR) -> Path:
    """A checkpoint of one F32 tensor of four elements, or of one pickled object, whose bytes are `archive`."""
    root.mkdir()
    (root / "__0_0.distcp").write_bytes(archive)
    size = Record(SIZE, ((4,),))
    layout = Record(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    properties = Record(PROPERTIES, state=(Global("torch", "float32"), layout, False, None, False), new=True)
    chunk = Record(CHUNK, state={"offsets": Record(SIZE, ((0,),)), "sizes": size}, new=True)
    tensor = {"properties": properties, "size": size, "chunks": [chunk]}
    is_tensor = kind == TENSOR
    offset = Record(SIZE, ((0,),)) if is_tensor else None
    index = Record(INDEX, state={"fqn": "w", "index": 0, "offset": offset}, new=True)
    place = {"relative_path": "__0_0.distcp", "offset": 0, "length": len(archive)}
    document = {
        "state_dict_metadata": {"w": Record(kind, state=tensor if is_tensor else {}, new=True)},
        "storage_data": {index: Record(STORAGE_INFO, state=place, new=True)},
    }
    (root / ".metadata").write_bytes(dumps(Record(METADATA, state=document, new=True)))
    return root


def saved(path: Path, data_pickle: bytes) -> bytes:
    """An archive as torch.save makes it, with its own data.pkl."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (
            ("data.pkl", data_pickle),
            ("byteorder", b"little"),
            ("data/0", bytes(16)),
            ("version", b"3"),
        ):
            archive.writestr(f"archive/{name}", data)
    return path.read_bytes()


def test_a_whole_checkpoint_made_here_is_read(tmp_path: Path, watched: Watched) -> None:
    """Else a refusal would say nothing about gadgets."""
    storage = ("storage", Global("torch", "FloatStorage"), "0", "cpu", 4)
    args = (Persistent(storage), 0, (4,), (1,), False, Record(ORDERED_DICT))
    tensor = dumps(Record(Global("torch._utils", "_rebuild_tensor_v2"), args))
    root = dcp(tmp_path / "good", saved(tmp_path / "a.zip", tensor))
    assert watched.run("verify", root) == {"outcome": "ok", "message": "", "events": []}


@pytest.mark.parametrize("place", ["metadata", "data.pkl", "BYTE_IO", "bin", "pt beside json"])
def test_no_gadget_runs_wherever_it_lies(tmp_path: Path, watched: Watched, place: str) -> None:
    mark = tmp_path / "ran"
    for number, gadget in enumerate(gadgets(mark)):
        root = tmp_path / str(number)
        if place == "metadata":
            root.mkdir()
            (root / ".metadata").write_bytes(gadget.data)
        elif place == "data.pkl":
            dcp(root, saved(tmp_path / "a.zip", gadget.data))
        elif place == "BYTE_IO":
            dcp(root, gadget.data, kind=BYTES)
        else:
            root.mkdir()
            (root / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoConfig": "evil.Evil"}}')
            (root / ("pytorch_model.bin" if place == "bin" else "weights.pt")).write_bytes(gadget.data)
        found = watched.run("verify" if number % 2 else "inspect", root)
        wanted = "ok" if place == "BYTE_IO" else "FormatError"
        assert (found["outcome"], found["events"]) == (wanted, []), gadget.name
        if place.startswith(("bin", "pt")):
            assert "only as pickles" in found["message"]
    assert not mark.exists()


def test_python_files_are_copied_as_text_and_never_imported(tmp_path: Path, watched: Watched) -> None:
    source = make_repository(tmp_path / "source", "qwen3", auto_map={"AutoConfig": "configuration_evil.Evil"})
    evil = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for name in ("configuration_evil.py", "sitecustomize.py", "conftest.py", "json.py", "numpy.py"):
        (source / name).write_text(evil)
    for verb, path, output in (
        ("inspect", source, None),
        ("convert", source, tmp_path / "native"),
        ("verify", tmp_path / "native", None),
        ("consolidate", tmp_path / "native", tmp_path / "back"),
        ("verify", tmp_path / "back", None),
    ):
        found = watched.run(verb, path, output)
        assert (found["outcome"], found["events"]) == ("ok", []), (verb, found)
    assert (tmp_path / "back" / "configuration_evil.py").read_text() == evil
    assert json.loads((tmp_path / "back" / "config.json").read_text())["auto_map"]
    assert not (tmp_path / "ran").exists()


def test_pickles_beside_the_weights_are_left_behind(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3")
    for name in ("extra.bin", "extra.pt", "vocab.pkl", "scaler.joblib", "training_args.bin", "state.pickle"):
        (source / name).write_bytes(pickle.dumps(1))
    convert(source, tmp_path / "native")
    consolidate(tmp_path / "native", tmp_path / "back")
    for root in ("native/hf", "back"):
        names = {path.name for path in (tmp_path / root).iterdir()}
        assert not {n for n in names if n.endswith((".bin", ".pt", ".pkl", ".joblib", ".pickle"))}


@pytest.mark.parametrize("answer", [None, False, True])
def test_trust_remote_code_is_passed_on_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bool | None
) -> None:
    transformers = pytest.importorskip("transformers")
    from automodel import NeMoAutoModelForCausalLM

    source = make_repository(tmp_path / "source", "qwen3")
    given: list[object] = []

    class Stop(Exception):
        pass

    def from_pretrained(*_: object, **options: object) -> None:
        given.append(options.get("trust_remote_code", "absent"))
        raise Stop

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(Stop):
        NeMoAutoModelForCausalLM.from_pretrained(str(source), trust_remote_code=answer)
    assert given == [answer]


def test_remote_code_does_not_run_in_from_pretrained_unless_it_is_trusted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from automodel import NeMoAutoModelForCausalLM

    source = make_repository(tmp_path / "source", "qwen3")
    config = {**json.loads((source / "config.json").read_text()), "model_type": "evil"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Evil"}}))
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(Exception, match=r"trust_remote_code|evil"):
        NeMoAutoModelForCausalLM.from_pretrained(str(source))
    assert not (tmp_path / "ran").exists()
