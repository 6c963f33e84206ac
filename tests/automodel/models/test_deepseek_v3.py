"""DeepSeek V3 from its files: FP8 weights, the FP32 correction bias, and layers for multi-token prediction."""

from __future__ import annotations

import json
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
from automodel.compat import TRANSFORMERS_5
from automodel.models import NeMoDeepseekV3ForCausalLM
from automodel.parallel.local import tensors_by_name
from automodel.parallel.mesh import MeshConfig, ParallelMesh
from automodel.training.config import ModelConfig
from automodel.training.model import build_model, open_source
from automodel.training.optimizer import OptimizerConfig, build_optimizer
from ckpt_tools import consolidate, convert, roundtrip
from ckpt_tools.core.errors import LayoutError, UsageError
from tests.automodel.helpers import DEEPSEEK_V3, pair, relative, rope, tokens
from tests.automodel.ranks import run_ranks

# No projection is a multiple of 128 wide, and 136 + 8 rows end within a block as the published 512 + 64 do.
WIDE = {**DEEPSEEK_V3, "hidden_size": 160, "q_lora_rank": 72, "kv_lora_rank": 136, "moe_intermediate_size": 144}
STATE = TrainState(step=1, tokens=0, seed=0, world_size=2, data_fingerprint="")
MODEL = "model.safetensors"
BIAS = "mlp.gate.e_score_correction_bias"
BIASES = [f"model.layers.{layer}.{BIAS}" for layer in (1, 2)]


def write(root: Path, *, predict: bool = False, **changes: Any) -> dict[str, torch.Tensor]:
    """A BF16 repository whose config counts one layer for multi-token prediction; with it if `predict`.

    Returns its tensors. Correction biases are FP32 and not representable in BF16.
    """
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**{**DEEPSEEK_V3, **changes}, **rope(1e4), num_nextn_predict_layers=1)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root)
    tensors = load_file(root / MODEL)
    if predict:
        tensors |= {n.replace(".2.", ".3.", 1): t for n, t in tensors.items() if n.startswith("model.layers.2.")}
        hidden, vocabulary = config.hidden_size, config.vocab_size
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"model.layers.3.{name}.weight"] = torch.empty(hidden, dtype=torch.bfloat16)
        for name in ("embed_tokens", "shared_head.head"):
            tensors[f"model.layers.3.{name}.weight"] = torch.empty(vocabulary, hidden, dtype=torch.bfloat16)
        tensors["model.layers.3.eh_proj.weight"] = torch.empty(hidden, 2 * hidden, dtype=torch.bfloat16)
    for name, tensor in tensors.items():
        is_bias = name.endswith(BIAS)
        values = torch.rand(tensor.shape) * 0.3 + 2**-12 if is_bias else torch.randn(tensor.shape) * 0.1
        tensors[name] = values if is_bias else values.bfloat16()
    save_file(tensors, root / MODEL, metadata={"format": "pt"})
    return tensors


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor) for name, tensor in expected.items()
    )


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens(2, 14)).logits


@pytest.mark.parametrize("mesh", [None, "dp_shard=2,ep=2"])
def test_the_fp8_form_gives_the_logits_of_its_values(tmp_path: Path, mesh: str | None) -> None:
    write(tmp_path / "bf16", **WIDE)
    convert(tmp_path / "bf16", tmp_path / "first")
    consolidate(tmp_path / "first", tmp_path / "fp8", quantize="fp8")
    stored = load_file(tmp_path / "fp8" / MODEL)
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)
    save_file(dequantised(stored), tmp_path / "bf16" / MODEL, metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)

    direct = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    plain = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    assert same(direct.state_dict(), plain.state_dict())
    convert(tmp_path / "fp8", tmp_path / "native", dequantize=True, mesh=mesh)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    assert relative(logits(ours), logits(theirs)) < 1e-5
    ours.bfloat16().save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert same(load_file(tmp_path / "plain" / MODEL), load_file(tmp_path / "bf16" / MODEL))


def dequantised(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values that FP8 codes and the scales of their blocks of 128 x 128 stand for, in BF16."""
    found = {name: tensor for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    for name in found.keys() & {name.removesuffix("_scale_inv") for name in stored.keys() - found.keys()}:
        rows, columns = found[name].shape
        scale = stored[f"{name}_scale_inv"].double()
        wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        found[name] = (found[name].double() * wide).float().bfloat16()
    assert sum(name.endswith("_scale_inv") for name in stored) > 60
    return found


def test_the_correction_bias_stays_float32_bit_for_bit_through_every_step(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf", predict=True)
    exact = {name: tensors[name] for name in (*BIASES, f"model.layers.3.{BIAS}")}
    assert not any(torch.equal(bias, bias.bfloat16().float()) for bias in exact.values())

    def unchanged(found: dict[str, torch.Tensor]) -> bool:
        return same({name: tensor for name, tensor in found.items() if name.endswith(BIAS)}, exact)

    convert(tmp_path / "hf", tmp_path / "native")
    convert(tmp_path / "hf", tmp_path / "cast", dtype="BF16", mesh="dp_shard=2,ep=2")
    for source in ("hf", "native", "cast"):
        for dtype in (torch.bfloat16, torch.float32):
            model = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / source, dtype=dtype)
            assert {p.dtype for p in model.parameters()} == {dtype}
            assert unchanged(model.state_dict())
    model.bfloat16().save_pretrained(tmp_path / "saved")
    consolidate(tmp_path / "native", tmp_path / "consolidated", dtype="BF16")
    consolidate(tmp_path / "native", tmp_path / "fp8", quantize="fp8")
    for written in ("saved", "consolidated", "fp8"):
        assert unchanged(load_file(tmp_path / written / MODEL))


def test_layers_for_multi_token_prediction_are_kept_and_neither_run_nor_trained(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf", predict=True)
    assert roundtrip(tmp_path / "hf", work=tmp_path, mesh="dp_shard=2,ep=2").tensors == len(tensors)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    held = {name: parameter for name, parameter in ours.named_parameters() if name.startswith("model.layers.3.")}
    assert len(held) == 20
    assert not any(parameter.requires_grad for parameter in held.values())
    optimizer = build_optimizer(ours, OptimizerConfig(lr=0.1))
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in held.values()}

    ours.train()(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    optimizer.step()
    ours.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / MODEL)
    assert saved.keys() == tensors.keys()
    assert not torch.equal(saved["lm_head.weight"], tensors["lm_head.weight"])
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")}
    assert same({name: saved[name] for name in kept}, kept)

    expected = logits(ours)
    for parameter in held.values():
        parameter.data.fill_(torch.nan)
    assert torch.equal(logits(ours), expected)


def test_a_repository_without_the_prediction_layer_that_its_config_counts_loads(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    convert(tmp_path / "hf", tmp_path / "native", mesh="ep=2")
    consolidate(tmp_path / "native", tmp_path / "back")
    consolidate(tmp_path / "native", tmp_path / "fp8", quantize="fp8")
    assert same(load_file(tmp_path / "back" / MODEL), tensors)
    assert not any(name.startswith("model.layers.3.") for name in load_file(tmp_path / "fp8" / MODEL))
    for source in ("hf", "native"):
        ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / source, dtype="auto")
        assert len(ours.model.layers) == 3
    ours.save_pretrained(tmp_path / "saved")
    assert same(load_file(tmp_path / "saved" / MODEL), tensors)


def test_a_prediction_layer_that_is_there_in_part_is_an_error(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf", predict=True)
    tensors.pop("model.layers.3.eh_proj.weight")
    save_file(tensors, tmp_path / "hf" / MODEL, metadata={"format": "pt"})
    with pytest.raises(LayoutError, match=r"model\.layers\.3\.eh_proj\.weight"):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_a_prediction_layer_beyond_those_that_the_config_counts_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "hf", predict=True)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(LayoutError, match="unexpected"):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def _save_and_resume(repository: Path, checkpoint: Path) -> int:
    """Saves as training does, resumes from it, and returns the layers that the resumed model has."""
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
                checkpoint, state, family="deepseek_v3", side_files=source.side_files(), source=source.origin
            )
        else:
            assert load_checkpoint(checkpoint, model, optimizer) == STATE
        models.append(model)
    pairs = zip(*(tensors_by_name(model).items() for model in models), strict=True)
    assert all(mine == other and torch.equal(local(a), local(b)) for (mine, a), (other, b) in pairs)
    return len(models[1].model.layers)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("predict", [False, True])
def test_a_run_resumes_with_the_layers_of_its_checkpoint(tmp_path: Path, predict: bool) -> None:
    tensors = write(tmp_path / "hf", predict=predict)
    layers = run_ranks(2, _save_and_resume, tmp_path / "hf", tmp_path / "step-1")
    assert layers == [3 + predict] * 2
    consolidate(tmp_path / "step-1", tmp_path / "published")
    assert same(load_file(tmp_path / "published" / MODEL), tensors)


def test_fresh_models_have_no_prediction_layer_and_a_zero_bias(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(**DEEPSEEK_V3, num_nextn_predict_layers=1)
    fresh = NeMoAutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert len(fresh.model.layers) == 3
    for name in BIASES:
        bias = fresh.state_dict()[name]
        assert bias.dtype == torch.float32
        assert not bias.any()
    fresh.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["topk_method"], config["scoring_func"], config["moe_layer_freq"]) == ("noaux_tc", "sigmoid", 1)
    assert {load_file(tmp_path / MODEL)[name].dtype for name in BIASES} == {torch.float32}


def test_the_cache_holds_the_latents_and_not_the_heads() -> None:
    _, ours = pair("deepseek_v3")
    with torch.no_grad():
        cache = ours(tokens(2, 7), use_cache=True).past_key_values
    ours_sizes = ours.config.kv_lora_rank, ours.config.qk_rope_head_dim
    assert (cache.layers[0].keys.shape, cache.layers[0].values.shape) == tuple((2, 1, 7, n) for n in ours_sizes)


def test_router_logits_are_those_of_the_expert_layers_and_make_no_loss() -> None:
    theirs, ours = pair("deepseek_v3")
    ids = tokens(2, 9)
    with torch.no_grad():
        output = ours(ids, labels=ids, output_router_logits=True)
        assert torch.equal(output.loss, ours(ids, labels=ids).loss)
        expected = theirs(ids, output_router_logits=True) if TRANSFORMERS_5 else None
    assert output.aux_loss is None
    assert [logits.shape for logits in output.router_logits] == [(18, 8)] * 2
    if expected is not None:
        for actual, wanted in zip(output.router_logits, expected.router_logits, strict=True):
            assert relative(actual, wanted) < 1e-5


@pytest.mark.parametrize(("field", "value"), [("scoring_func", "softmax"), ("topk_method", "greedy")])
def test_routing_that_is_not_computed_is_refused(field: str, value: str) -> None:
    config = transformers.DeepseekV3Config(**DEEPSEEK_V3, **{field: value})
    with pytest.raises(UsageError, match=field):
        NeMoDeepseekV3ForCausalLM(config)
