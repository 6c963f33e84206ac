"""What only a GPU can show: CUDA kernels against transformers, and two GPUs over NCCL against one.

Skipped without CUDA. Run on a machine with one or more GPUs: `python -m pytest tests/gpu`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert, verify
from ckpt_tools.formats import hf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(gpus < 1, reason="needs a CUDA GPU")

SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 768,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE repository saved by transformers."""
    root = tmp_path_factory.mktemp("gpu") / "source"
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root)
    return root


@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [(torch.float32, "torch", 1e-5), (torch.bfloat16, "auto", 0.02), (torch.bfloat16, "sonic", 0.02)],
)
def test_logits_and_gradients_on_the_gpu_are_those_of_float32_transformers(
    source: Path, dtype: torch.dtype, backend: str, tolerance: float
) -> None:
    from automodel import NeMoAutoModelForCausalLM

    if backend == "sonic":
        pytest.importorskip("quack")
    ids = torch.randint(0, SIZES["vocab_size"], (4, 256), device="cuda")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).cuda()
    ours = NeMoAutoModelForCausalLM.from_pretrained(source, dtype=dtype, device="cuda", backend=backend)
    expected, actual = theirs(ids, labels=ids), ours(ids, labels=ids)
    # The median over positions: rounding sends a few tokens to another expert.
    error = (actual.logits.float() - expected.logits).square().mean(-1).sqrt().median()
    assert error < tolerance * expected.logits.square().mean().sqrt()
    assert torch.isclose(actual.loss.float(), expected.loss, rtol=tolerance)
    expected.loss.backward()
    actual.loss.backward()
    mine, reference = ours.lm_head.weight.grad.float(), theirs.lm_head.weight.grad
    assert (mine - reference).norm() < 2.5 * tolerance * reference.norm()
    assert ours.model.layers[0].mlp.experts.gate_up_proj.grad.isfinite().all()


def test_bfloat16_experts_run_fused(source: Path) -> None:
    from automodel import NeMoAutoModelForCausalLM

    model = NeMoAutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device="cuda")
    assert {row.layer: row.kernel for row in model.backend_report().rows}["experts"] == "fused"


def train(work: Path, source: Path, processes: int, mesh: dict[str, int]) -> list[dict[str, float]]:
    """Metrics of 12 steps of `ckpt train` on the given mesh; checkpoints and export are beside them."""
    work.mkdir()
    text = work / "text.jsonl"
    tokenizer = Path(__file__).parents[2] / "examples" / "demo" / "tokenizer"
    for file in tokenizer.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    lines = (Path(__file__).parents[2] / "README.md").read_text().splitlines() * 20
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines if line))
    recipe = {
        "model": {"source": str(source), "dtype": "float32", "compute_dtype": "bfloat16"},
        "data": {"files": [str(text)], "seq_len": 64},
        "mesh": mesh,
        "steps": 12,
        "global_batch_size": 16,
        "micro_batch_size": 4,
        "optimizer": {"lr": 1e-3},
        "output_dir": str(work / "run"),
        "export_dir": str(work / "export"),
    }
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run([*torchrun, "-m", "automodel.training", str(work / "recipe.yaml")], check=True)
    return [json.loads(line) for line in next((work / "run").glob("metrics*.jsonl")).read_text().splitlines()]


@pytest.fixture(scope="module")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose vocabulary is that of the example's tokenizer."""
    root = tmp_path_factory.mktemp("gpu") / "trainable"
    tokenizer = Path(__file__).parents[2] / "examples" / "demo" / "tokenizer"
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**{**SIZES, "vocab_size": vocabulary})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root)
    return root


def test_a_run_on_every_gpu_learns_like_a_run_on_one_and_its_checkpoint_comes_back_whole(
    tmp_path: Path, trainable: Path
) -> None:
    one = train(tmp_path / "one", trainable, 1, {})
    assert one[-1]["loss"] < one[0]["loss"]
    for name, mesh in {"ep": {"dp_shard": 1, "ep": gpus}, "fsdp": {"dp_shard": gpus}}.items():
        if gpus == 1:
            continue
        many = train(tmp_path / name, trainable, gpus, mesh)
        # Both compute in BF16, in another order of rows; the first loss is that of the same weights.
        assert many[0]["loss"] == pytest.approx(one[0]["loss"], rel=2e-3)
        assert many[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=2e-2)
        assert many[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=3e-2)
    last = "one" if gpus == 1 else "ep"
    saved = max((tmp_path / last / "run").rglob("step-*"), key=lambda p: p.name)
    consolidate(saved, tmp_path / "consolidated")
    verify(tmp_path / "consolidated", against=tmp_path / last / "export")
    convert(tmp_path / "consolidated", tmp_path / "native")
    verify(tmp_path / "native", against=saved)
    names = hf.open_repository(tmp_path / "consolidated").store.tensors
    assert len(names) == len(hf.open_repository(trainable).store.tensors)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "consolidated", dtype=torch.bfloat16).cuda()
