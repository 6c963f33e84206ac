"""The benchmarks of training and of the full model: their dry runs are the whole of their code at tiny widths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training_profile import exposed, merged, second_half, summary

ROOT = Path(__file__).parents[1]
needs_grouped_mm = pytest.mark.skipif(
    version("transformers").startswith("4."), reason="transformers 4 has no grouped experts to compare with"
)


def run(script: str, *arguments: str, out: Path) -> tuple[str, dict[str, Any]]:
    """What a benchmark printed, and the JSON that it wrote."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--dry", "--out", str(out), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (document,) = out.glob("*.json")
    return done.stdout, json.loads(document.read_text(encoding="utf-8"))


@needs_grouped_mm
def test_ours_on_two_meshes_and_transformers_make_the_same_steps(tmp_path: Path) -> None:
    arguments = ["--case", "qwen3-30b", "--gpus", "4", "--ep", "4,2", "--implementations", "ours,transformers"]
    printed, document = run("training.py", *arguments, "--micro-batches", "1,2c", "--profile", out=tmp_path)
    rows = [(row["implementation"], row["ep"], row["micro_batch"], row["checkpointing"]) for row in document["rows"]]
    batches = [(1, False), (2, True)]
    expected = [("ours", 4), ("ours", 2), ("transformers", 1)]
    assert rows == [(*run, *batch) for run in expected for batch in batches]
    # It ended well, so the losses agree; that they are losses of a model that learns is seen here.
    for row in document["rows"]:
        assert row["losses"][-1] < row["losses"][0], row
        assert row["grad_norm"] > 1, "nothing was clipped"
    assert "qwen3-30b on 4 GPUs, sequence 4,096: GiB of each GPU, predicted" in printed


def test_a_model_goes_from_its_processes_to_a_repository_that_equals_it(tmp_path: Path) -> None:
    arguments = ["--gpus", "2", "--optimizer", "--scratch", str(tmp_path / "scratch")]
    _, document = run("full_model.py", *arguments, out=tmp_path / "out")
    rows = {row["phase"]: row for row in document["rows"]}
    assert [*rows] == [
        *("make weights", "step before the save", "save", "step after the save"),
        *("touch host memory", "take host memory", "standing still", "step beside the save", "save beside steps"),
        *("export", "consolidate", "verify", "against"),
    ]
    # Parameters and two states of AdamW, but for its counts of steps.
    assert rows["save"]["gb"] == pytest.approx(3 * rows["export"]["gb"], rel=0.01, abs=0.001)
    assert rows["against"]["report"]["checks"][-1].startswith("values: ")
    assert not (tmp_path / "scratch").exists()


def test_communication_is_exposed_where_no_other_kernel_runs() -> None:
    assert exposed([(0, 10)], []) == 10
    assert exposed([(0, 10), (5, 12)], [(2, 4), (3, 6), (11, 20)]) == 7
    assert exposed([(0, 10)], [(0, 10)]) == 0
    assert merged([(5, 6), (0, 2), (2, 3)]) == [(0, 3), (5, 6)]


def test_a_profile_tells_kinds_of_kernels_apart() -> None:
    found = summary(
        [
            ("nvjet_tst_128x256", (0.0, 1000.0)),
            ("ncclDevKernel_AllGather_RING_LL", (500.0, 2000.0)),
            ("barrier_kernel", (3000.0, 3500.0)),
            ("triton_red_fused_add_0", (3500.0, 4000.0)),
        ]
    )
    assert found["exposed_communication"] == 1.5
    assert found["idle"] == 1.0
    assert found["gaps"] == [[1.0, "ncclDevKernel_AllGather_RING_LL", "barrier_kernel"]]
    kinds = {kind: value for kind, value in found["milliseconds_by_kind"].items() if value}
    assert kinds == {"communication": 2.0, "dense products": 1.0, "norms, rope, residuals": 0.5}
    assert found["top"][0] == ["ncclDevKernel_AllGather_RING_LL", 1.5, 1]


def test_the_second_of_two_steps_is_profiled_with_the_wait_before_it() -> None:
    step = [("nvjet_a", (0.0, 1000.0)), ("_adamw", (1000.0, 2000.0))]
    again = [(name, (begin + 2500, end + 2500)) for name, (begin, end) in step]
    kernels, since = second_half([*again, *step])
    assert (kernels, since) == (again, 2000.0)
    found = summary(kernels, since)
    assert (found["idle"], found["gaps"]) == (0.5, [[0.5, "", "nvjet_a"]])
    assert second_half([]) == ([], None)
