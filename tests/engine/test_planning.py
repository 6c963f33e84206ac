"""Planning at the size of published models: linear in tensors, and small, from true headers with holes for the data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sparse import DEEPSEEK_V3, sparse_native, sparse_repository
from ckpt_tools.api import consolidate, convert, inspect
from ckpt_tools.engine.checkpoint import open_checkpoint
from ckpt_tools.engine.ends import leaf_ends
from ckpt_tools.families import family_of
from ckpt_tools.formats import hf
from ckpt_tools.formats.dcp import metadata
from ckpt_tools.layouts import algebra
from tests.checkpoints import CONFIGS

MESH = "dp_shard=2,ep=2"


def config_of(layers: int, experts: int) -> dict[str, Any]:
    return {**CONFIGS["deepseek_v3"], "num_hidden_layers": layers, "n_routed_experts": experts}


def calls_of(act: Callable[[], object]) -> int:
    """Function calls that `act` makes, those into C among them: work that no other process can disturb."""
    count = 0

    def seen(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


SIZES = {
    "layers": [(layers, 8) for layers in (8, 16, 32)],
    "experts": [(4, experts) for experts in (32, 64, 128)],
}
JOBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "convert": lambda plain, _whole, _ranks: convert(plain, "", dry_run=True),
    "convert for a mesh": lambda plain, _whole, _ranks: convert(plain, "", mesh=MESH, dry_run=True),
    "consolidate": lambda _plain, whole, _ranks: consolidate(whole, "", dry_run=True),
    "consolidate from a mesh": lambda _plain, _whole, ranks: consolidate(ranks, "", dry_run=True),
    "consolidate into FP8": lambda _plain, whole, _ranks: consolidate(whole, "", quantize="fp8", dry_run=True),
    "inspect": lambda plain, _whole, _ranks: inspect(plain),
}


@pytest.mark.parametrize("grows", SIZES)
def test_the_work_of_a_plan_grows_with_the_tensors_and_no_faster(tmp_path: Path, grows: str) -> None:
    work: dict[str, list[int]] = {job: [] for job in JOBS}
    for layers, experts in SIZES[grows]:
        root = tmp_path / f"{layers}-{experts}"
        plain = sparse_repository(root / "hf", config_of(layers, experts), max_file_size=200_000)
        whole = sparse_native(plain, root / "whole", max_file_size="200KB")
        ranks = sparse_native(plain, root / "ranks", mesh=MESH)
        for job, run in JOBS.items():
            work[job].append(calls_of(lambda run=run, paths=(plain, whole, ranks): run(*paths)))
    for job, (once, twice, four_times) in work.items():
        # Of a linear cost the second doubling adds twice what the first added; a quadratic one adds four times.
        growth = (four_times - twice) / (twice - once)
        assert growth < 2.2, f"{job}: {once:,}, {twice:,}, {four_times:,} calls"


def test_every_header_is_read_once_however_many_tensors_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's consolidation parses a file's header for each of its tensors: quadratic (4,000 tensors took 170 s).
    plain = sparse_repository(tmp_path / "hf", config_of(6, 16), max_file_size=50_000)
    whole = sparse_native(plain, tmp_path / "native", max_file_size="50KB")
    chunks = len(open_checkpoint(whole).store.tensors)
    read: Counter[str] = Counter()

    def counted(module: Any, name: str, key: Callable[..., str]) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            read[key(*arguments)] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counted(hf, "read_header", lambda path, *_: path.name)
    counted(metadata, "parse", lambda _data, source: source)
    counted(metadata, "locate", lambda _fd, start, _length, path: f"{path} at {start}")
    convert(plain, "", dry_run=True)
    consolidate(whole, "", dry_run=True)
    files = len(list(plain.glob("*.safetensors")))
    assert files > 10
    assert set(read.values()) == {1}
    assert len(read) == files + 1 + chunks


def test_layers_of_one_kind_share_a_view_that_is_made_and_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    leaf = algebra.leaf
    monkeypatch.setattr(algebra, "leaf", lambda name, shape: made.append(name) or leaf(name, shape))
    layout = family_of(config_of(2, 8)).layout(config_of(2, 8))  # type: ignore[union-attr]
    of_two, made[:] = len(made), []
    larger = family_of(config_of(20, 8)).layout(config_of(20, 8))  # type: ignore[union-attr]
    assert len(made) == of_two
    down = [tensor for name, tensor in larger.native.items() if name.endswith("experts.down_proj")]
    assert len({id(tensor.pattern) for tensor in down if "layers.20" not in tensor.name}) == 1
    assert len({tensor.leaves for tensor in down}) == len(down)
    assert layout.native["model.layers.1.mlp.experts.down_proj"].view.pieces[7].leaf == (
        "model.layers.1.mlp.experts.7.down_proj.weight"
    )


MEASURED = """
import json, sys
from ckpt_tools import convert
report = convert(sys.argv[1], "", dequantize=True, dry_run=True)
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([report.tensors, report.dequantized, int(peak) * 1024]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_deepseek_v3_in_fp8_is_planned_and_proven_in_under_500_mb(tmp_path: Path) -> None:
    source = sparse_repository(tmp_path / "DeepSeek-V3", DEEPSEEK_V3, form="fp8")
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert (len(weight_map), len(set(weight_map.values()))) == (91_991, 163)
    run = subprocess.run([sys.executable, "-c", MEASURED, str(source)], capture_output=True, text=True, check=True)
    tensors, dequantised, peak = json.loads(run.stdout)
    assert (tensors, dequantised) == (46_183, 45_808)
    assert peak < 500e6


def test_every_chunk_of_a_mesh_is_cut_as_it_was_one_by_one(tmp_path: Path) -> None:
    # Two layers share what is cut; a checkpoint of one layer of each kind shares nothing.
    plain = sparse_repository(tmp_path / "hf", config_of(4, 8))
    ranks = open_checkpoint(sparse_native(plain, tmp_path / "ranks", mesh="dp_shard=3,ep=4"))
    together = ranks.ends()
    for name, tensor in ranks.store.tensors.items():
        native = ranks.layout.native[name]
        alone = leaf_ends(
            type(ranks.store)(ranks.store.root, "dcp", {name: tensor}, {}), ranks.layout, "native", native.leaves
        )
        for leaf, end in alone.items():
            assert end == together[leaf]
