"""Damage to every format: what is broken is refused, and what is accepted holds the same tensors as before.

The oracle of structural damage: opening and proving the checkpoint raises one of our errors, or the names, dtypes,
shapes and stored bytes of all its tensors equal those of the undamaged one (a flipped date in a zip record, text in
`__metadata__`). The oracle of damaged values: `verify` raises `MismatchError` wherever a manifest has digests.

Set `CKPT_HOSTILE=full` to flip every byte and bit; otherwise a fixed part of them is.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert, verify
from ckpt_tools.core.errors import EXIT_CODES, CkptError, FormatError, LayoutError, MismatchError
from tests.hostile.specimens import SPECIMENS, contents, payload, structure

FULL = os.environ.get("CKPT_HOSTILE") == "full"
FLIPS = 120
"""Bytes of a specimen's structure that the quick suite flips, and bits of its values."""

Specimen = tuple[Path, dict[str, tuple[str, tuple[int, ...], str]]]


@pytest.fixture(scope="module", params=SPECIMENS)
def specimen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    root = SPECIMENS[request.param](tmp_path_factory.mktemp("specimen"))
    return root, contents(root)


@contextmanager
def damaged(path: Path, data: bytes) -> Iterator[None]:
    """`path` with other content, restored afterwards."""
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def judge(specimen: Specimen, what: str) -> bool:
    """Whether the damage was refused; fails when it was neither refused nor harmless."""
    root, expected = specimen
    try:
        found = contents(root)
    except CkptError as error:
        return EXIT_CODES[error.exit_code] != EXIT_CODES[0]
    assert found == expected, f"{what}: accepted with other tensors"
    return False


def part(places: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """All of the places, or as many as the quick suite has time for, spread over the files."""
    return places if FULL else random.Random(0).sample(places, min(FLIPS, len(places)))


def test_a_flipped_byte_of_the_structure_is_refused_or_changes_nothing(specimen: Specimen) -> None:
    root, _ = specimen
    refused = 0
    places = part(structure(root))
    for file, position in places:
        data = bytearray((root / file).read_bytes())
        data[position] ^= 1 << (position % 8)
        with damaged(root / file, bytes(data)):
            refused += judge(specimen, f"{file}, byte {position}")
    assert refused > len(places) / 4, "flips do not reach what is read"


def test_a_file_cut_anywhere_is_refused(specimen: Specimen) -> None:
    root, _ = specimen
    names = {file for file, _, _ in payload(root)} | {".metadata", "model.safetensors.index.json"}
    for path in (root / name for name in sorted(names) if (root / name).exists()):
        data = path.read_bytes()
        step = 64 if FULL else max(64, len(data) // 12 // 64 * 64)
        for length in [*range(0, len(data), step), len(data) - 1]:
            if data[:length].strip() == data.strip():
                continue  # the line break at the end of a document
            with damaged(path, data[:length]):
                assert judge(specimen, f"{path.name} cut to {length} bytes"), f"{path.name} cut to {length} bytes"


@pytest.mark.parametrize("tail", [b"\0", b" ", bytes(4096), b"{}", b"PK\x05\x06" + bytes(18)])
def test_bytes_appended_are_refused_or_change_nothing(specimen: Specimen, tail: bytes) -> None:
    root, _ = specimen
    for name in sorted({file for file, _, _ in payload(root)} | {".metadata", "model.safetensors.index.json"}):
        path = root / name
        if path.exists():
            with damaged(path, path.read_bytes() + tail):
                refused = judge(specimen, f"{name} with {tail[:4]!r} appended")
            harmless = path.suffix == ".distcp" or (path.suffix == ".json" and tail == b" ")
            assert refused or harmless, name


def test_a_missing_file_is_refused(specimen: Specimen) -> None:
    root, _ = specimen
    for file in {file for file, _, _ in payload(root)}:
        os.rename(root / file, root.parent / "away")
        assert judge(specimen, f"{file} is missing")
        os.rename(root.parent / "away", root / file)


def test_swapped_and_doubled_files_are_refused_or_found_by_their_digests(specimen: Specimen) -> None:
    """Shards of safetensors say themselves where they belong: under each other's names they are the same checkpoint."""
    root, expected = specimen
    for one, other in combinations(sorted({file for file, _, _ in payload(root)}), 2):
        first, second = (root / one).read_bytes(), (root / other).read_bytes()
        for left, right in ((second, first), (first, first)):
            with damaged(root / one, left), damaged(root / other, right):
                try:
                    verify(root, threads=1)
                except CkptError:
                    continue
                assert contents(root) == expected, f"{one}, {other}"


def test_the_same_tensors_in_another_file_are_refused(specimen: Specimen) -> None:
    root, _ = specimen
    if not list(root.glob("*.safetensors")) or list(root.glob("shard-*")):
        pytest.skip("only where every file of a folder is read, each tensor from one")
    for path in list(root.glob("*.safetensors")):
        shutil.copy(path, root / f"again-{path.name}")
        with pytest.raises(FormatError):
            contents(root)
        (root / f"again-{path.name}").unlink()


def test_flipped_bits_of_values_are_found_by_verify(specimen: Specimen) -> None:
    """2,000 bits in the full suite over all formats; each is checked alone."""
    root, _ = specimen
    choose = random.Random(1)
    spans = payload(root)
    for _ in range(2000 // len(SPECIMENS) if FULL else FLIPS // 4):
        file, position, length = choose.choice(spans)
        data = bytearray((root / file).read_bytes())
        data[position + choose.randrange(length)] ^= 1 << choose.randrange(8)
        with damaged(root / file, bytes(data)), pytest.raises(MismatchError):
            verify(root, threads=1)


def flip_value(root: Path) -> None:
    """One bit of a matrix in the middle of the model; norms are ones in no specimen."""
    file, position, _ = payload(root)[5]
    data = bytearray((root / file).read_bytes())
    data[position + 1] ^= 4
    (root / file).write_bytes(data)


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("hf", convert),
        ("hf", lambda root, out: convert(root, out, dtype="float32")),
        ("hf sharded", lambda root, out: convert(root, out, mesh="dp_shard=3")),
        ("hf fp8", lambda root, out: convert(root, out, dequantize=True)),
        ("hf mxfp4", lambda root, out: convert(root, out, dequantize=True, dtype="float32")),
        ("dcp", consolidate),
        ("dcp of a mesh", lambda root, out: consolidate(root, out, dtype="float16")),
        ("dcp of a mesh", lambda root, out: consolidate(root, out, quantize="fp8")),
        ("sharded safetensors", consolidate),
        ("training save", consolidate),
    ],
)
def test_a_copy_of_a_damaged_source_refuses_where_a_manifest_has_digests(
    tmp_path: Path, name: str, copy: Callable[[Path, Path], object]
) -> None:
    root = SPECIMENS[name](tmp_path)
    copy(root, tmp_path / "good")
    flip_value(root)
    with pytest.raises(MismatchError):
        copy(root, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    assert not list(tmp_path.glob(".bad*"))


@pytest.mark.parametrize("fault", ["moved", "forgotten", "invented", "elsewhere"])
def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path: Path, fault: str) -> None:
    root = SPECIMENS["hf sharded"](tmp_path)
    path = root / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = list(index["weight_map"])
    files = sorted(set(index["weight_map"].values()))
    if fault == "moved":
        index["weight_map"][names[0]] = next(f for f in files if f != index["weight_map"][names[0]])
    elif fault == "forgotten":
        del index["weight_map"][names[0]]
    elif fault == "invented":
        index["weight_map"]["model.layers.9.w"] = files[0]
    else:
        index["weight_map"][names[0]] = "model-00009-of-00009.safetensors"
    path.write_text(json.dumps(index))
    for act in (contents, verify, lambda at: convert(at, tmp_path / "out")):
        with pytest.raises(FormatError):
            act(root)
    assert not (tmp_path / "out").exists()


def test_a_header_that_makes_integers_of_weights_is_refused(tmp_path: Path) -> None:
    from tests.checkpoints import make_repository

    root = make_repository(tmp_path / "source", "qwen3", dtype="F32")
    path = next(iter(root.glob("*.safetensors")))
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(LayoutError, match="is I32, and weights are floating point"):
        contents(root)


def test_a_manifest_that_no_longer_speaks_of_the_tensors_is_a_mismatch(tmp_path: Path) -> None:
    root = SPECIMENS["hf"](tmp_path)
    path = root / "ckpt-manifest.json"
    manifest = json.loads(path.read_text())
    for change in ({"form": "mxfp4"}, {"tensors": {"a": "b"}}, {"digest": "none"}):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises((MismatchError, FormatError)):
            verify(root)
    # One that speaks of fewer is what sharing leaves, and as good as none: that is said.
    names = sorted(manifest["tensors"])
    path.write_text(json.dumps({**manifest, "tensors": {names[0]: manifest["tensors"][names[0]]}}))
    assert any(f"none recorded for {len(names) - 1} tensors" in line for line in verify(root).checks)
