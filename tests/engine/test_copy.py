"""Whole copies: bit for bit through any mesh, interrupted at any moment, on full disks and changing inputs."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools import consolidate, convert, inspect, plan, roundtrip, verify
from ckpt_tools.cli.copying import copy_lines
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import (
    CkptError,
    FormatError,
    InputChangedError,
    LayoutError,
    MismatchError,
    ResourceError,
)
from ckpt_tools.engine import execute, staging
from ckpt_tools.engine.checkpoint import open_checkpoint
from ckpt_tools.engine.copy import fingerprint
from ckpt_tools.engine.targets import plan_native
from ckpt_tools.families import FAMILIES
from tests.checkpoints import make_repository, tensor_bytes, write_repository

MESHES = st.one_of(st.none(), st.builds("dp_shard={},ep={}".format, st.integers(1, 5), st.integers(1, 5)))


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    experts=st.integers(1, 5),
    groups=st.integers(1, 3),
    queries=st.integers(1, 3),
    dense=st.sets(st.integers(0, 2)),
    tied=st.booleans(),
    first=MESHES,
    second=MESHES,
    file_format=st.sampled_from(["dcp", "safetensors"]),
    dtype=st.sampled_from(["BF16", "F32", "F8_E4M3"]),
)
def test_every_checkpoint_comes_back_bit_for_bit_through_any_two_meshes(
    tmp_path_factory: pytest.TempPathFactory,
    family: str,
    experts: int,
    groups: int,
    queries: int,
    dense: set[int],
    tied: bool,
    first: str | None,
    second: str | None,
    file_format: str,
    dtype: str,
) -> None:
    root = tmp_path_factory.mktemp("case")
    config = {
        "num_experts" if family.startswith("qwen3") else "num_local_experts": experts,
        "n_routed_experts": experts,
        "num_attention_heads": groups * queries,
        "num_key_value_heads": groups,
        "linear_num_key_heads": groups,
        "linear_num_value_heads": groups * queries,
        "mlp_only_layers": sorted(dense),
        "tie_word_embeddings": tied,
    }
    source = make_repository(root / "source", family, dtype=dtype, **config)
    expected = tensor_bytes(source)
    convert(source, root / "a", mesh=first, file_format=file_format)
    convert(root / "a", root / "b", mesh=second, max_file_size=30_000)
    consolidate(root / "b", root / "back", max_shard_size=15_000)
    assert tensor_bytes(root / "back") == expected
    verify(root / "a", against=root / "b")
    verify(root / "back", against=root / "a")


def test_roundtrip_checks_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source")
    before = sorted(p.name for p in tmp_path.iterdir())
    report = roundtrip(source, work=tmp_path)
    assert report.tensors == len(tensor_bytes(source))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_unknown_architecture_keeps_its_names_shapes_and_odd_dtypes(tmp_path: Path) -> None:
    tensors = {
        "scalar": (DTYPES["F32"], ()),
        "empty": (DTYPES["BF16"], (0, 4)),
        "flags": (DTYPES["BOOL"], (7,)),
        "ids": (DTYPES["I64"], (3, 5)),
        "packed": (DTYPES["U8"], (33, 3)),
        "state": (DTYPES["F64"], (2, 3, 4)),
    }
    source = write_repository(tmp_path / "source", tensors, {"model_type": "somebody-elses"})
    convert(source, tmp_path / "native", mesh="dp_shard=2")
    consolidate(tmp_path / "native", tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)
    assert inspect(tmp_path / "native").family == "identity"


def test_a_native_checkpoint_carries_the_side_files_byte_for_byte(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source")
    convert(source, tmp_path / "native")
    consolidate(tmp_path / "native", tmp_path / "back")
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "native/hf" / name).read_bytes() == (source / name).read_bytes()
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "back/config.json").read_bytes())
    original = json.loads((source / "config.json").read_bytes())
    assert original.items() <= config.items()
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_parameters"]["rope_theta"] == original["rope_theta"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source")
    before = os.umask(0o027)
    try:
        convert(source, tmp_path / "native")
    finally:
        os.umask(before)
    for path in (tmp_path / "native").rglob("*"):
        expected = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_casting_rounds_to_nearest_even_and_keeps_nan(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    np = pytest.importorskip("numpy")
    source = make_repository(tmp_path / "source", dtype="F32")
    report = convert(source, tmp_path / "native", dtype="bf16")
    consolidate(tmp_path / "native", tmp_path / "back")
    assert report.casts == report.tensors
    back = tensor_bytes(tmp_path / "back")
    with np.errstate(invalid="ignore", over="ignore"):
        for name, data in tensor_bytes(source).items():
            expected = np.frombuffer(data, np.float32).astype(ml_dtypes.bfloat16)
            assert expected.tobytes() == back[name]
    assert json.loads((tmp_path / "back/config.json").read_bytes())["torch_dtype"] == "bfloat16"


def test_pieces_of_one_native_tensor_with_different_dtypes_are_refused(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3")
    store = inspect(source)
    assert store.family == "qwen3"
    tensors = {
        name: (DTYPES["F32" if name.endswith("k_proj.weight") else "BF16"], shape)
        for name, shape in _shapes(source).items()
    }
    mixed = write_repository(tmp_path / "mixed", tensors, json.loads((source / "config.json").read_bytes()))
    with pytest.raises(LayoutError, match="different dtypes"):
        convert(mixed, tmp_path / "native")
    convert(mixed, tmp_path / "native", dtype="float32")


def _shapes(source: Path) -> dict[str, tuple[int, ...]]:
    from ckpt_tools.formats import hf

    return {name: tensor.shape for name, tensor in hf.open_repository(source).store.tensors.items()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_tied_name_on_disk_is_dropped_when_equal_and_refused_when_not(tmp_path: Path, family: str) -> None:
    source = make_repository(tmp_path / "source", family, tie_word_embeddings=True)
    config = json.loads((source / "config.json").read_bytes())
    shapes = _shapes(source)
    tensors = {
        n: (DTYPES["BF16"], s) for n, s in {**shapes, "lm_head.weight": shapes["model.embed_tokens.weight"]}.items()
    }
    different = write_repository(tmp_path / "different", tensors, config)
    with pytest.raises(MismatchError, match=r"ties lm_head\.weight"):
        convert(different, tmp_path / "native")
    with pytest.raises(MismatchError, match=r"ties lm_head\.weight"):
        verify(different)
    equal = write_repository(tmp_path / "equal", tensors, config, max_shard_size=10**9)
    _copy_tensor(equal, "model.embed_tokens.weight", "lm_head.weight")
    report = convert(equal, tmp_path / "native")
    assert list(report.dropped) == ["lm_head.weight"]
    consolidate(tmp_path / "native", tmp_path / "back")
    assert "lm_head.weight" not in tensor_bytes(tmp_path / "back")


def _copy_tensor(root: Path, source: str, target: str) -> None:
    from ckpt_tools.formats import hf

    tensors = hf.open_repository(root).store.tensors
    data = tensor_bytes(root)[source]
    chunk = tensors[target].chunks[0]
    with open(root / chunk.file, "r+b") as file:
        file.seek(chunk.position)
        file.write(data)


def test_missing_and_unexpected_tensors_are_refused_before_the_first_write(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source")
    config = json.loads((source / "config.json").read_bytes())
    shapes = _shapes(source)
    shapes["model.layers.0.mlp.experts.9.gate_proj.weight"] = shapes.pop("model.norm.weight")
    broken = write_repository(tmp_path / "broken", {n: (DTYPES["BF16"], s) for n, s in shapes.items()}, config)
    with pytest.raises(LayoutError, match=r"1 missing\n  model\.norm\.weight\n1 unexpected"):
        convert(broken, tmp_path / "native")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "source"]


def test_a_flipped_payload_bit_is_found_by_verify_and_by_a_copy(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source")
    convert(source, tmp_path / "native")
    consolidate(tmp_path / "native", tmp_path / "good")
    file = tmp_path / "good/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    with pytest.raises(MismatchError, match="do not have the digest"):
        verify(tmp_path / "good")
    with pytest.raises(MismatchError, match="differ"):
        verify(tmp_path / "good", against=source, digests=False)
    with pytest.raises(MismatchError, match="digest"):
        convert(tmp_path / "good", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_digests_by_another_algorithm_are_refused_by_verify_and_left_aside_by_a_copy_that_says_so(
    tmp_path: Path,
) -> None:
    source = make_repository(tmp_path / "source")
    assert convert(source, tmp_path / "native").unchecked == ""
    assert consolidate(tmp_path / "native", tmp_path / "good").unchecked == ""
    path = tmp_path / "good/ckpt-manifest.json"
    manifest = json.loads(path.read_text())
    manifest["digest"] = "sha512/1GiB"
    manifest["tensors"] = dict.fromkeys(manifest["tensors"], "0")
    path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"'sha512/1GiB'; this version makes 'xxh3-128/32MiB'") as refused:
        verify(tmp_path / "good")
    assert "--no-digests" in str(refused.value.hint)
    verify(tmp_path / "good", against=source, digests=False)
    report = convert(tmp_path / "good", tmp_path / "again")
    assert "sha512/1GiB" in report.unchecked
    assert any(line.startswith("unchecked") for line in copy_lines(report))
    verify(tmp_path / "again", against=source)


def test_a_run_that_cut_leaves_otherwise_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(make_repository(tmp_path / "source"))
    planned = plan_native(source, mesh=None, file_format="dcp", dtype=None, max_file_size=10**9)
    before = fingerprint(planned, tmp_path / "out")
    assert fingerprint(planned, tmp_path / "out") == before
    monkeypatch.setattr("ckpt_tools.engine.copy.ALGORITHM", "xxh3-128/1MiB")
    assert fingerprint(planned, tmp_path / "out") != before


def test_too_little_disk_is_refused_before_the_first_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_repository(tmp_path / "source")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match="free"):
        convert(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_too_little_memory_for_one_thread_is_refused(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source")
    with pytest.raises(ResourceError, match="memory"):
        plan(source, memory="1MB")
    assert plan(source, memory="5MB", threads=8).threads == 1


def test_an_input_that_changes_during_the_run_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_repository(tmp_path / "source")
    file = next(source.glob("*.safetensors"))
    run = execute.run_task

    def meddling(*arguments: object) -> bytes:
        os.utime(file, ns=(1, time.time_ns()))
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(execute, "run_task", meddling)
    with pytest.raises(InputChangedError, match="changed while it was being read"):
        convert(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_a_rerun_redoes_only_what_was_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_repository(tmp_path / "source")
    run, done = execute.run_task, [0]

    def dying(*arguments: object) -> bytes:
        if done[0] == 20:
            raise KeyboardInterrupt
        done[0] += 1
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(execute, "run_task", dying)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "native", threads=1)
    redone = [0]

    def counting(*arguments: object) -> bytes:
        redone[0] += 1
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(execute, "run_task", counting)
    report = convert(source, tmp_path / "native", threads=1)
    assert redone[0] == report.tensors - 20
    monkeypatch.undo()
    verify(tmp_path / "native", against=source)


def test_one_thread_and_eight_write_the_same_files(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source")
    for threads in (1, 8):
        convert(source, tmp_path / f"native{threads}", mesh="dp_shard=2", threads=threads)
    for path in (tmp_path / "native1").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "native8" / path.relative_to(tmp_path / "native1")).read_bytes()


def test_long_tensors_are_cut_into_segments_with_one_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_tools.engine.plan.SEGMENT", 1024)
    source = make_repository(tmp_path / "source")
    convert(source, tmp_path / "native", mesh="dp_shard=3,ep=2")
    consolidate(tmp_path / "native", tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)
    verify(tmp_path / "native")


def test_no_plan_step_opens_tensor_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_repository(tmp_path / "source")
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("tensor data was read"))
    report = plan(source, mesh="ep=2")
    assert report.destination is None
    with pytest.raises(CkptError):
        plan(source, to="sideways")
    assert staging.JOURNAL not in os.listdir(source)


def test_each_header_is_parsed_once_however_many_tensors_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt_tools.formats import hf

    source = make_repository(tmp_path / "source", num_experts=32)
    parsed: list[Path] = []
    read_header = hf.read_header
    monkeypatch.setattr(hf, "read_header", lambda path, root: parsed.append(path) or read_header(path, root))
    report = convert(source, tmp_path / "native")
    files = list(source.glob("*.safetensors"))
    assert report.tensors > 100
    assert sorted(parsed) == sorted(files)
