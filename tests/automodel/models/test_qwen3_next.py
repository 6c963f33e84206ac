"""Qwen3-Next and Qwen3.5 from their files: FP8, FP32 decays, the block for multi-token prediction, vision tensors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from automodel import NeMoAutoModelForCausalLM
from automodel.checkpoint import TrainState, load_checkpoint, save_checkpoint
from automodel.checkpoint.state import TRAIN_STATE_JSON, model_state, optimizer_state
from automodel.logging import log_once
from automodel.models import NATIVE_MODELS, NativeCausalLM
from automodel.models.delta_net import Decay
from automodel.parallel.local import tensors_by_name
from automodel.parallel.mesh import MeshConfig, ParallelMesh
from automodel.training.config import ModelConfig
from automodel.training.model import build_model, open_source
from automodel.training.optimizer import OptimizerConfig, build_optimizer
from ckpt_tools import consolidate, convert, roundtrip
from ckpt_tools.core.errors import LayoutError, UsageError
from ckpt_tools.families import get_family
from tests.automodel.helpers import CONFIGS, DELTA_NET, SHARED_EXPERT, native_state, pair, relative, tokens
from tests.automodel.ranks import run_ranks

FAMILIES = [name for name in ("qwen3_next", "qwen3_5_moe", "qwen3_5") if name in CONFIGS]
STATE = TrainState(step=1, tokens=0, seed=0, world_size=2, data_fingerprint="")
MODEL = "model.safetensors"
STATES = ("A_log", "dt_bias")
every_family = pytest.mark.parametrize("family", FAMILIES)


def write(root: Path, family: str = "qwen3_next", *, predict: bool = True, **changes: Any) -> dict[str, torch.Tensor]:
    """A BF16 repository by transformers, with random values, the `mtp.*` tensors if `predict`, and FP32 decays.

    Returns its tensors. Decays are not representable in BF16.
    """
    torch.manual_seed(0)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root)
    shapes = {name: tensor.shape for name, tensor in load_file(root / MODEL).items()}
    if predict:
        leaves = get_family(family).layout(config.to_dict()).leaves
        shapes |= {name: leaf.shape for name, leaf in leaves.items() if name.startswith("mtp.")}
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(tuple(shape)) * 0.1 + 2**-12
        tensors[name] = values if name.endswith(STATES) else values.bfloat16()
    save_file(tensors, root / MODEL, metadata={"format": "pt"})
    return tensors


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor) for name, tensor in expected.items()
    )


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens(2, 14)).logits


@every_family
def test_files_give_the_logits_of_transformers_and_come_back_bit_for_bit(tmp_path: Path, family: str) -> None:
    tensors = write(tmp_path / "hf", family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = logits(theirs)
    assert roundtrip(tmp_path / "hf", work=tmp_path, mesh="dp_shard=2").tensors == len(tensors)
    convert(tmp_path / "hf", tmp_path / "native")
    for source in ("hf", "native"):
        ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / source, dtype=torch.bfloat16)
        assert isinstance(ours, NativeCausalLM)
        ours.save_pretrained(tmp_path / f"{source} saved")
        assert same(load_file(tmp_path / f"{source} saved" / MODEL), tensors)
        ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / source, dtype=torch.float32)
        assert relative(logits(ours), expected) < 1e-5


def test_decays_stay_float32_bit_for_bit_through_every_step(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf")
    exact = {name: tensor for name, tensor in tensors.items() if name.endswith(STATES)}
    assert exact
    assert not any(torch.equal(state, state.bfloat16().float()) for state in exact.values())

    def unchanged(root: Path) -> bool:
        return same({name: t for name, t in load_file(root / MODEL).items() if name.endswith(STATES)}, exact)

    convert(tmp_path / "hf", tmp_path / "native", dtype="BF16", mesh="dp_shard=2,ep=2")
    model = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.bfloat16)
    dtypes = {name.rpartition(".")[2] in STATES: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    model.float().bfloat16().save_pretrained(tmp_path / "saved")
    consolidate(tmp_path / "native", tmp_path / "consolidated", dtype="BF16")
    consolidate(tmp_path / "native", tmp_path / "fp8", quantize="fp8")
    assert all(unchanged(tmp_path / root) for root in ("saved", "consolidated", "fp8"))


def test_the_fp8_form_gives_the_logits_of_its_values(tmp_path: Path) -> None:
    write(tmp_path / "bf16", predict=True)
    convert(tmp_path / "bf16", tmp_path / "first")
    consolidate(tmp_path / "first", tmp_path / "fp8", quantize="fp8")
    stored = load_file(tmp_path / "fp8" / MODEL)
    scaled = {name.removesuffix("_scale_inv") for name in stored if name.endswith("_scale_inv")}
    assert {"mtp.layers.0.self_attn.q_proj.weight", "model.layers.0.linear_attn.in_proj_qkvz.weight"} <= scaled
    assert not any(part in name for name in scaled for part in ("in_proj_ba", "conv1d", "mtp.fc", "shared_expert_gate"))
    values = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    for name in scaled:
        # Every matrix is a single block here.
        values[name] = (values[name].double() * stored[f"{name}_scale_inv"].double().item()).float().bfloat16()
    save_file(values, tmp_path / "bf16" / MODEL, metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)

    convert(tmp_path / "fp8", tmp_path / "native", dequantize=True, mesh="dp_shard=2,ep=2")
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    assert relative(logits(ours), logits(theirs)) < 1e-5
    directly = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16).float()
    assert relative(logits(directly), logits(theirs)) < 1e-5


@every_family
def test_the_block_for_multi_token_prediction_is_kept_and_neither_run_nor_trained(tmp_path: Path, family: str) -> None:
    tensors = write(tmp_path / "hf", family)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    held = {name: parameter for name, parameter in ours.named_parameters() if name.startswith("mtp.")}
    assert held
    assert not any(parameter.requires_grad for parameter in held.values())
    optimizer = build_optimizer(ours, OptimizerConfig(lr=0.1))
    ours.train()(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    optimizer.step()
    ours.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / MODEL)
    assert saved.keys() == tensors.keys()
    trained = "model.layers.0.linear_attn.A_log"
    assert not torch.equal(saved[trained], tensors[trained])
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors if name.startswith("mtp."))
    expected = logits(ours)
    for parameter in held.values():
        parameter.data.fill_(torch.nan)
    assert torch.equal(logits(ours), expected)


def test_a_repository_without_that_block_loads_and_one_with_a_part_of_it_does_not(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf", predict=False)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert not hasattr(ours, "mtp")
    ours.save_pretrained(tmp_path / "saved")
    assert same(load_file(tmp_path / "saved" / MODEL), tensors)
    tensors["mtp.fc.weight"] = torch.zeros(32, 64, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "hf" / MODEL, metadata={"format": "pt"})
    with pytest.raises(LayoutError, match=r"mtp\.layers\.0"):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def _save_and_resume(repository: Path, checkpoint: Path) -> bool:
    """Saves as training does, resumes from it, and returns whether the resumed model has the block."""
    mesh = ParallelMesh.of(MeshConfig(dp_shard=1, ep=2).build())
    config = ModelConfig(str(repository), dtype="bfloat16")
    models = []
    for path, values in ((repository, True), (checkpoint, False)):
        source = open_source(path, None)
        model = build_model(config, source, mesh, torch.device("cpu"), values=values)
        optimizer = build_optimizer(model, OptimizerConfig())
        if values:
            state = {**model_state(model), **optimizer_state(model, optimizer), TRAIN_STATE_JSON: STATE.encode()}
            save_checkpoint(
                checkpoint, state, family="qwen3_next", side_files=source.side_files(), source=source.origin
            )
        else:
            assert load_checkpoint(checkpoint, model, optimizer) == STATE
        models.append(model)
    pairs = zip(*(tensors_by_name(model).items() for model in models), strict=True)
    assert all(mine == other and torch.equal(local(a), local(b)) for (mine, a), (other, b) in pairs)
    return hasattr(models[1], "mtp")


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("predict", [False, True])
def test_a_run_resumes_with_what_its_checkpoint_has(tmp_path: Path, predict: bool) -> None:
    tensors = write(tmp_path / "hf", predict=predict)
    assert run_ranks(2, _save_and_resume, tmp_path / "hf", tmp_path / "step-1") == [predict] * 2
    consolidate(tmp_path / "step-1", tmp_path / "published")
    assert same(load_file(tmp_path / "published" / MODEL), tensors)


def test_fresh_models_start_as_those_of_transformers() -> None:
    fresh = NeMoAutoModelForCausalLM.from_config(CONFIGS["qwen3_next"](), dtype=torch.bfloat16)
    assert not hasattr(fresh, "mtp")
    for module in fresh.modules():
        if isinstance(module, Decay):
            assert torch.equal(module.dt_bias, torch.ones(4))
            rates = module.A_log.exp()
            assert rates.dtype == torch.float32
            assert 0 < rates.min() < rates.max() < 16
    state = {name: tensor for name, tensor in fresh.state_dict().items() if name.endswith("norm.weight")}
    assert all(bool((tensor == ("linear_attn" in name)).all()) for name, tensor in state.items())


def test_the_config_that_is_saved_says_what_every_reader_asks_for(tmp_path: Path) -> None:
    NeMoAutoModelForCausalLM.from_config(CONFIGS["qwen3_next"]()).save_pretrained(tmp_path / "irregular")
    config = json.loads((tmp_path / "irregular" / "config.json").read_text())
    assert config["layer_types"] == DELTA_NET["layer_types"]
    assert config["partial_rotary_factor"] == config["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert config["architectures"] == ["Qwen3NextForCausalLM"]
    assert config["full_attention_interval"] == 2


def test_the_cache_is_of_constant_size_and_packed_documents_make_none() -> None:
    _, ours = pair("qwen3_next")
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    with torch.no_grad():
        cache = ours(tokens(2, 7), use_cache=True).past_key_values
        states = [cache.layers[0].recurrent_states[0]] if hasattr(cache, "layers") else [cache.recurrent_states[0]]
        assert states[0].shape == (2, 4, 8, 12)
        assert states[0].dtype == torch.float32
        assert ours(tokens(1, 9), position_ids=positions).past_key_values is None
        both = ours(tokens(2, 9), position_ids=positions).logits
        assert relative(both, ours(tokens(2, 9), position_ids=positions.expand(2, -1)).logits) == 0
        with pytest.raises(UsageError, match="packed documents"):
            ours(tokens(1, 9), position_ids=positions, use_cache=True)


def test_the_report_says_what_runs_linear_attention() -> None:
    _, ours = pair("qwen3_next")
    rows = {row.layer: row for row in ours.backend_report().rows}
    assert (rows["attention"].count, rows["linear attention"].count) == (1, 2)
    assert rows["linear attention"].kernel == rows["short convolution"].kernel == "torch"
    assert "flash-linear-attention" in rows["linear attention"].reason
    with pytest.raises(UsageError, match="fla cannot run here"):
        NATIVE_MODELS["qwen3_next"](CONFIGS["qwen3_next"](), backend={"linear_attention": "fla"})(tokens(1, 3))


@pytest.mark.skipif(not hasattr(transformers, "Qwen3_5MoeConfig"), reason="this transformers has no Qwen3.5")
def test_a_multimodal_repository_keeps_its_vision_tensors_and_runs_in_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = {**DELTA_NET, **SHARED_EXPERT}
    del text["intermediate_size"]
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "patch_size": 4}
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3_5MoeForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / MODEL)
    # As published: experts stacked, and the block for multi-token prediction.
    prefix = "model.language_model.layers.0.mlp.experts."
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    tensors[prefix + "gate_up_proj"] = torch.randn(6, 48, 32).bfloat16()
    tensors[prefix + "down_proj"] = torch.randn(6, 32, 24).bfloat16()
    tensors["mtp.fc.weight"] = torch.randn(32, 64).bfloat16()
    save_file(tensors, tmp_path / "hf" / MODEL, metadata={"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "native", mesh="dp_shard=2")
    consolidate(tmp_path / "native", tmp_path / "back")
    assert same(load_file(tmp_path / "back" / MODEL), tensors)
    assert sum(name.startswith("model.visual.") for name in tensors) == 21

    log_once.cache_clear()
    with caplog.at_level(logging.INFO, "automodel"):
        loaded = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(loaded).__name__ == "Qwen3_5MoeForCausalLM"
    assert "qwen3_5_moe has no native ModelForCausalLM" in caplog.text
    state = native_state(dict(loaded.state_dict()), loaded.config)
    assert torch.equal(state["model.layers.0.mlp.experts.down_proj"], tensors[prefix + "down_proj"])
