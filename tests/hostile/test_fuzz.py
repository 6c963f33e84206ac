"""A short run of the fuzzers, the inputs that once mattered, and documents made to be expensive.

The long run is `make fuzz`; this one takes seconds. Its inputs are the same every time.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.fuzz.__main__ import TARGETS, by_grammar
from tests.hostile.fuzz.grammar import generators
from tests.hostile.fuzz.targets import Finding, Targets

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*/*"))
INPUTS = 700


@pytest.fixture(scope="module")
def targets() -> Iterator[Targets]:
    made = Targets()
    yield made
    made.close()


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_of_the_grammar_are_refused_in_words_or_read_as_safetensors_reads_them(target: str) -> None:
    result = by_grammar(target, 0, INPUTS)
    assert not result.findings, result.findings[0]
    assert 5 < result.accepted < INPUTS * 0.9, "the grammar makes only whole inputs, or none"


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(choose=st.randoms(use_true_random=False))
def test_hypothesis_finds_no_input_that_is_not_refused_in_words(
    targets: Targets, target: str, choose: random.Random
) -> None:
    targets.run(target, generators(targets)[target](choose))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_an_input_of_the_corpus_is_judged_as_its_name_says(targets: Targets, path: Path) -> None:
    begun = time.process_time()
    accepted = targets.run(path.parent.name, path.read_bytes())
    assert accepted == path.name.startswith("accepted-")
    assert time.process_time() - begun < 1


def test_the_corpus_has_inputs_of_every_target() -> None:
    assert {path.parent.name for path in CORPUS} == set(TARGETS)
    assert len(CORPUS) >= 100


def test_a_finding_is_one(targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle can fail: a reader that takes the next tensor's bytes, and one that raises what is not ours."""
    from tests.hostile.fuzz import targets as module

    whole = next(path for path in CORPUS if path.name == "accepted-padded").read_bytes()
    real = module.read_header

    def shifted(path: Path) -> object:
        header = real(path)
        header.tensors["a"] = header.tensors["a"]._replace(position=header.tensors["a"].position - 1)
        return header

    monkeypatch.setattr(module, "read_header", shifted)
    with pytest.raises(Finding, match="reads other tensors"):
        targets.run("safetensors", whole)
    monkeypatch.setattr(module, "read_header", lambda _: {}["missing"])
    with pytest.raises(KeyError):
        targets.run("safetensors", whole)


BOMBS = {
    "lists": '"a":[' + "[]," * 100 + "1]",
    "strings": '"a":[' + '"ab",' * 100 + "1]",
    "numbers": '"a":[' + "999," * 100 + "1]",
    "entries": ",".join(f'"{n:03d}":"ab"' for n in range(100)),
    "empty tensors": ",".join(f'"{n:03d}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(100)),
    "brackets in text": '"a":"' + "[{,:" * 100 + '"',
}
PROGRAM = """
import sys, time
from pathlib import Path
from ckpt_tools.core.errors import CkptError
from ckpt_tools.formats.documents import read_json_object
from ckpt_tools.formats.safetensors import read_header
path = Path(sys.argv[1])
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
begun = time.process_time()
try:
    read_header(path) if path.suffix == ".safetensors" else read_json_object(path)
except CkptError:
    pass
print((peak() - before) // 1024, time.process_time() - begun)
"""


@pytest.mark.parametrize("name", ["x.safetensors", "x.json"])
@pytest.mark.parametrize("kind", BOMBS)
def test_22_mib_of_anything_cost_a_few_times_their_size(tmp_path: Path, kind: str, name: str) -> None:
    """As a safetensors header and as a document, in a process of its own. Elsewhere 22 MiB took 580 MiB (TRAPS 21)."""
    size = 22 << 20
    unit = BOMBS[kind]
    body = "{" + ",".join([unit.replace('"0', f'"{n:06d}') for n in range(size // (len(unit) + 5))]) + "}"
    text = body.encode()
    length = len(text).to_bytes(8, "little")
    (tmp_path / name).write_bytes(length + text if name == "x.safetensors" else text)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    mebibytes, seconds = map(float, run.stdout.split())
    assert mebibytes < 370, f"{mebibytes} MiB"
    assert seconds < 10, f"{seconds} s"


def test_a_million_chunks_of_a_tangle_take_no_quadratic_time() -> None:
    from ckpt_tools.formats.tiling import find_fault

    begun = time.process_time()
    count = 3000
    tangle = [((i, i), (2 * count, 1)) for i in range(count)]
    assert "no grid" in (find_fault((4 * count, 4 * count), tangle) or "")
    assert time.process_time() - begun < 3


def test_keys_chosen_to_have_one_hash_take_no_quadratic_time(targets: Targets) -> None:
    path = next(path for path in CORPUS if path.name == "refused-keys-of-one-hash")
    begun = time.process_time()
    assert not targets.run("metadata", path.read_bytes())
    assert time.process_time() - begun < 0.2


def test_a_file_that_declares_exabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((1 << 63).to_bytes(8, "little"))
        file.truncate(1 << 40)
    (tmp_path / "config.json").write_text("")
    with open(tmp_path / "ckpt-manifest.json", "wb") as file:
        file.truncate(1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    from ckpt_tools.core.errors import FormatError
    from ckpt_tools.engine.manifest import read_manifest
    from ckpt_tools.formats.safetensors import read_header

    for act in (lambda: read_header(path), lambda: read_manifest(tmp_path)):
        with pytest.raises(FormatError, match="limit"):
            act()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
