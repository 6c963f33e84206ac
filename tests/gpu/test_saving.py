"""Saves beside training on a GPU: page-locked copies of the moment of the save, and the files of a save that waits.

Skipped without CUDA. Run on a machine with one or more GPUs: `python -m pytest tests/gpu`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from ckpt_tools import verify

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(gpus < 1, reason="needs a CUDA GPU")

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "demo" / "tokenizer"
GIB = 1 << 30


def a_state() -> dict[str, torch.Tensor]:
    """300 MB on the GPU, contiguous and not, and some on the host, as the counters of an optimizer are."""
    generator = torch.Generator("cuda").manual_seed(0)
    return {
        "matrix": torch.rand(8192, 8192, device="cuda", generator=generator),
        "half": torch.rand(4097, 1031, device="cuda", generator=generator).to(torch.bfloat16),
        "turned": torch.rand(1000, 3000, device="cuda", generator=generator).T,
        "empty": torch.empty(0, 5, device="cuda"),
        "step": torch.tensor(3.0),
    }


def test_copies_are_of_the_moment_and_in_page_locked_memory() -> None:
    from automodel.checkpoint.host_memory import HostBuffer, bytes_for

    state = a_state()
    buffer = HostBuffer(bytes_for(state.values()), pinned=True)
    for factor in (1, 2):
        # Many kernels are queued before the copies, and change what they have to see.
        for _ in range(200):
            state["matrix"].mul_(1.001)
        copies = buffer.copy(state)
        expected = {name: tensor.cpu().clone() for name, tensor in state.items()}
        state["matrix"].zero_().add_(factor)
        torch.cuda.synchronize()
        assert all(torch.equal(copies[name], tensor) for name, tensor in expected.items())
        assert all(copy.is_pinned() for copy in copies.values() if copy.numel())
    buffer.release()
    assert not copies["matrix"].is_pinned()


def test_training_stands_still_for_the_time_of_the_bus_alone() -> None:
    from automodel.checkpoint.host_memory import HostBuffer, bytes_for

    state = {"large": torch.ones(4 * GIB, dtype=torch.uint8, device="cuda")}
    buffer = HostBuffer(bytes_for(state.values()), pinned=True)
    buffer.copy(state)
    started = time.perf_counter()
    buffer.copy(state)
    seconds = time.perf_counter() - started
    buffer.release()
    # Pageable memory goes at 2 to 6 GB/s; PCIe 4 has 25 and PCIe 5 has 50.
    assert seconds < 4 * GIB / 10e9


def test_memory_that_cannot_be_locked_is_refused_without_harm_to_later_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from automodel.checkpoint import Saver, host_memory

    lock = host_memory._lock

    def lock_twice(memory: torch.Tensor) -> None:
        lock(memory)
        lock(memory)

    monkeypatch.setattr(host_memory, "_lock", lock_twice)
    saver = Saver("auto", torch.device("cuda"), timedelta(seconds=60))
    saver.reserve({"small": torch.ones(1000, device="cuda")})
    assert saver._buffer is None
    assert torch.ones(5, device="cuda").sum().item() == 5


def test_the_files_are_those_of_a_save_that_training_waits_for(tmp_path: Path) -> None:
    from automodel.checkpoint import Saver, save_checkpoint

    state = a_state()
    description = {"family": "qwen3_moe", "side_files": {"config.json": b"{}"}, "source": {"from": "test"}}
    save_checkpoint(tmp_path / "waited", state, **description)
    with Saver("auto", torch.device("cuda"), timedelta(seconds=60)) as saver:
        saver.reserve(state)
        saver.save(tmp_path / "beside", state, partial(save_checkpoint, tmp_path / "beside", state, **description))
        for tensor in state.values():
            tensor.zero_()
    waited, beside = (
        sorted(path for path in (tmp_path / n).rglob("*") if path.is_file()) for n in ("waited", "beside")
    )
    assert [path.name for path in beside] == [path.name for path in waited]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(waited, beside, strict=True))


def test_a_run_on_every_gpu_saves_beside_training_and_resumes(tmp_path: Path) -> None:
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(TOKENIZER))
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=512, moe_intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4, norm_topk_prob=True,
    )  # fmt: skip
    source = tmp_path / "source"
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(source)
    for file in TOKENIZER.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    lines = (ROOT / "README.md").read_text().splitlines() * 20
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines if line))
    recipe = {
        "model": {"source": str(source), "dtype": "bfloat16"},
        "data": {"files": [str(tmp_path / "text.jsonl")], "seq_len": 64},
        "mesh": {"dp_shard": 1, "ep": gpus},
        "steps": 12,
        "global_batch_size": 16,
        "checkpoint": {"every": 4},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    command = [*torchrun, "-m", "automodel.training", str(tmp_path / "recipe.yaml")]
    for steps in ("12", "14"):
        done = subprocess.run([*command, "--set", f"steps={steps}"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if steps == "12":
            assert "of page-locked host memory in each process" in done.stderr
            assert done.stderr.count("training stood still for") == 3
    assert "resumed from" in done.stderr
    for step in (4, 8, 12, 14):
        verify(tmp_path / "run" / f"step-{step:06d}")
