"""The auto classes on a mesh: the same model as in one process, loaded, initialised and saved by parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

from automodel import MeshConfig, NeMoAutoModelForCausalLM
from automodel.parallel.mesh import MixedPrecision, ParallelMesh
from ckpt_tools import consolidate, convert
from tests.automodel.helpers import CONFIGS, pair, relative, tokens
from tests.automodel.ranks import run_ranks
from tests.checkpoints import tensor_bytes
from tests.quantised import config_of, make_quantised

MESHES = {
    "FSDP": MeshConfig(dp_shard=2),
    "experts divided": MeshConfig(dp_shard=1, ep=2),
    "replicated": MeshConfig(dp_replicate=2, dp_shard=1),
}
LARGE_MESHES = {
    "FSDP and experts divided": MeshConfig(dp_shard=2, ep=2),
    "replicated and experts divided": MeshConfig(dp_replicate=2, dp_shard=1, ep=2),
}


def _load_and_save(source: Path, mesh: MeshConfig, saved: Path) -> tuple[torch.Tensor, bool]:
    model = NeMoAutoModelForCausalLM.from_pretrained(source, device_mesh=mesh)
    all_sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with torch.no_grad():
        logits = model(tokens(2, 9)).logits
    model.save_pretrained(saved, max_shard_size="30KB")
    return logits, all_sharded


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "qwen3_moe sparse step, no renormalisation, biases", "mixtral", "qwen3_next"]
)
@pytest.mark.parametrize("mesh", [*MESHES, *LARGE_MESHES])
def test_a_mesh_loads_computes_and_saves_the_same_model(name: str, mesh: str, tmp_path: Path) -> None:
    theirs, _ = pair(name)
    theirs.save_pretrained(tmp_path / "source")
    with torch.no_grad():
        expected = theirs(tokens(2, 9)).logits
    world = 2 if mesh in MESHES else 4
    results = run_ranks(world, _load_and_save, tmp_path / "source", (MESHES | LARGE_MESHES)[mesh], tmp_path / "saved")
    for logits, all_sharded in results:
        assert relative(logits, expected) < 1e-5
        assert all_sharded
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    state = theirs.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def _compute_and_save(source: Path, saved: Path) -> torch.dtype:
    mesh = ParallelMesh.of(MeshConfig(dp_shard=2).build(), MixedPrecision(param_dtype=torch.bfloat16))
    model = NeMoAutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_mesh=mesh)
    with torch.no_grad():
        logits = model(tokens(2, 9)).logits
    model.save_pretrained(saved)
    return logits.dtype


def test_computing_in_a_narrower_dtype_leaves_the_saved_parameters_exact(tmp_path: Path) -> None:
    theirs, _ = pair("qwen3_moe")
    theirs.save_pretrained(tmp_path / "source")
    assert run_ranks(2, _compute_and_save, tmp_path / "source", tmp_path / "saved") == [torch.bfloat16] * 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in theirs.state_dict().items())


def _load_native(source: Path) -> torch.Tensor:
    model = NeMoAutoModelForCausalLM.from_pretrained(source, device_mesh=MeshConfig(dp_shard=1, ep=2))
    with torch.no_grad():
        return model(tokens(2, 9)).logits


def test_a_native_checkpoint_loads_in_one_process_and_on_a_mesh(tmp_path: Path) -> None:
    theirs, _ = pair("qwen3_moe")
    theirs.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "native")
    with torch.no_grad():
        expected = theirs(tokens(2, 9)).logits
        ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "native")
        assert relative(ours(tokens(2, 9)).logits, expected) < 1e-5
    assert ours.generation_config.eos_token_id == 2
    for logits in run_ranks(2, _load_native, tmp_path / "native"):
        assert relative(logits, expected) < 1e-5


def _quantised(source: Path, saved: Path, mesh: MeshConfig) -> bool:
    model = NeMoAutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_mesh=mesh)
    model.save_pretrained(saved)
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize("mesh", ["FSDP", "experts divided", "FSDP and experts divided"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_each_process_of_a_mesh_dequantises_its_own_part_and_the_export_is_plain(
    tmp_path: Path, family: str, mesh: str
) -> None:
    source = make_quantised(tmp_path / "source", family, num_hidden_layers=2)
    convert(source, tmp_path / "native", dequantize=True)
    consolidate(tmp_path / "native", tmp_path / "plain")
    world = 2 if mesh in MESHES else 4
    assert all(run_ranks(world, _quantised, source, tmp_path / "saved", (MESHES | LARGE_MESHES)[mesh]))
    assert tensor_bytes(tmp_path / "saved") == tensor_bytes(tmp_path / "plain")
    assert "quantization_config" not in config_of(tmp_path / "saved")


def _fresh(name: str, mesh: MeshConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    model = NeMoAutoModelForCausalLM.from_config(CONFIGS[name](), device_mesh=mesh)
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("name", "mesh"), [*(("qwen3_moe", mesh) for mesh in MESHES), ("qwen3_next", "experts divided")]
)
def test_fresh_weights_do_not_depend_on_the_mesh(name: str, mesh: str) -> None:
    expected = _fresh(name, MeshConfig(dp_shard=1))
    for weights in run_ranks(2, _fresh, name, MESHES[mesh]):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def _fallback(source: Path) -> tuple[str, torch.Tensor, bool]:
    model = NeMoAutoModelForCausalLM.from_pretrained(source, device_mesh=MeshConfig(dp_shard=2))
    sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with torch.no_grad():
        logits = model(tokens(2, 9)).logits
    fresh = NeMoAutoModelForCausalLM.from_config(model.config, device_mesh=MeshConfig(dp_shard=2))
    sharded = sharded and all(isinstance(parameter, DTensor) for parameter in fresh.parameters())
    return type(model).__name__, logits, sharded


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=64),
        transformers.GemmaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            vocab_size=97,
        ),
        transformers.Qwen2MoeConfig(
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=4,
            num_experts_per_tok=2,
            vocab_size=97,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_are_sharded_too(config: transformers.PretrainedConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(tokens(2, 9)).logits
    for name, logits, sharded in run_ranks(2, _fallback, tmp_path):
        assert name.endswith(type(theirs).__name__)
        assert sharded
        assert relative(logits, expected) < 1e-5
