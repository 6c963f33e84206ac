"""Nemotron-H from its files: FP32 state, layers for multi-token prediction, hybrids on a mesh, and its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from automodel import MeshConfig, NeMoAutoModelForCausalLM
from automodel.checkpoint import TrainState, load_checkpoint, save_checkpoint
from automodel.checkpoint.state import TRAIN_STATE_JSON, model_state, optimizer_state
from automodel.compat import TRANSFORMERS_5
from automodel.models import NATIVE_MODELS
from automodel.parallel.local import tensors_by_name
from automodel.parallel.mesh import ParallelMesh
from automodel.training.config import ModelConfig
from automodel.training.model import build_model, open_source
from automodel.training.optimizer import OptimizerConfig, build_optimizer
from ckpt_tools import consolidate, convert, roundtrip
from ckpt_tools.core.errors import LayoutError, UsageError
from ckpt_tools.families import get_family
from tests.automodel.helpers import pair, relative, tokens
from tests.automodel.ranks import run_ranks
from tests.checkpoints import make_repository

needs_transformers_5 = pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no Nemotron-H")
if TRANSFORMERS_5:
    from tests.automodel.helpers import NEMOTRON_H

STATE = TrainState(step=1, tokens=0, seed=0, world_size=2, data_fingerprint="")
FLOAT32 = ("A_log", ".D", "dt_bias", "gate.weight", "e_score_correction_bias")
MODEL = "model.safetensors"


def write(root: Path, *, predict: bool = False, **changes: Any) -> dict[str, torch.Tensor]:
    """A BF16 repository whose config counts layers for multi-token prediction; with them if `predict`.

    Returns its tensors. Those that drive a state or a choice are FP32 and not representable in BF16.
    """
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(**NEMOTRON_H, num_nextn_predict_layers=1, moe_latent_size=16, **changes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root)
    layout = get_family("nemotron_h").layout(config.to_dict())
    tensors = {}
    for name, leaf in layout.leaves.items():
        if predict or not name.startswith("mtp."):
            values = torch.rand(leaf.shape) * 0.3 + 2**-12 if name.endswith(FLOAT32) else torch.randn(leaf.shape) * 0.1
            tensors[name] = values if name.endswith(FLOAT32) else values.bfloat16()
    save_file(tensors, root / MODEL, metadata={"format": "pt"})
    return tensors


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor) for name, tensor in expected.items()
    )


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens(2, 14)).logits


@needs_transformers_5
def test_every_form_of_the_checkpoint_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    write(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "native", mesh="dp_shard=2,ep=2")
    consolidate(tmp_path / "native", tmp_path / "back")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    for source in ("hf", "native", "back"):
        ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / source, dtype=torch.float32)
        assert type(ours) is NATIVE_MODELS["nemotron_h"]
        assert relative(logits(ours), logits(theirs)) < 1e-5


@needs_transformers_5
def test_what_drives_states_and_choices_stays_float32_bit_for_bit_through_every_step(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf", predict=True)
    exact = {name: tensor for name, tensor in tensors.items() if name.endswith(FLOAT32)}
    assert len(exact) == 2 * 3 + 2 * 2
    assert not any(torch.equal(tensor, tensor.bfloat16().float()) for tensor in exact.values())

    def unchanged(written: str) -> bool:
        found = load_file(tmp_path / written / MODEL)
        return same({name: tensor for name, tensor in found.items() if name.endswith(FLOAT32)}, exact)

    convert(tmp_path / "hf", tmp_path / "cast", dtype="BF16", mesh="dp_shard=2,ep=2")
    consolidate(tmp_path / "cast", tmp_path / "consolidated", dtype="BF16")
    assert unchanged("consolidated")
    for source in ("hf", "cast"):
        model = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / source, dtype=torch.bfloat16)
        rest = {p.dtype for n, p in model.named_parameters() if ".ssm." not in n and "gate." not in n}
        assert rest == {torch.bfloat16}
        model.float().bfloat16().save_pretrained(tmp_path / f"saved {source}")
        assert unchanged(f"saved {source}")


@needs_transformers_5
def test_layers_for_multi_token_prediction_are_kept_and_neither_run_nor_trained(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf", predict=True)
    assert roundtrip(tmp_path / "hf", work=tmp_path, mesh="dp_shard=2,ep=2").tensors == len(tensors)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    held = {name: parameter for name, parameter in ours.named_parameters() if name.startswith("mtp.")}
    assert len(held) == 15
    assert not any(parameter.requires_grad for parameter in held.values())

    ours.train()(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    build_optimizer(ours, OptimizerConfig(lr=0.1)).step()
    ours.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / MODEL)
    assert saved.keys() == tensors.keys()
    assert not torch.equal(saved["lm_head.weight"], tensors["lm_head.weight"])
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    assert same({name: saved[name] for name in kept}, kept)

    expected = logits(ours)
    for parameter in held.values():
        parameter.data.fill_(torch.nan)
    assert torch.equal(logits(ours), expected)


@needs_transformers_5
def test_a_repository_without_the_prediction_layers_that_its_config_counts_loads_and_a_part_of_them_is_an_error(
    tmp_path: Path,
) -> None:
    tensors = write(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "native", mesh="ep=2")
    consolidate(tmp_path / "native", tmp_path / "back")
    assert same(load_file(tmp_path / "back" / MODEL), tensors)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")
    assert not any(name.startswith("mtp.") for name in tensors_by_name(ours))

    tensors["mtp.layers.1.final_layernorm.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / "hf" / MODEL, metadata={"format": "pt"})
    with pytest.raises(LayoutError, match=r"mtp\.layers\.0\.eh_proj\.weight"):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@needs_transformers_5
def test_the_repositorys_own_code_is_kept_and_named_in_the_config(tmp_path: Path) -> None:
    write(tmp_path / "hf")
    config, code = tmp_path / "hf" / "config.json", tmp_path / "hf" / "modeling_nemotron_h.py"
    auto_map = {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": auto_map}))
    code.write_text("raise SystemExit('run')\n")
    convert(tmp_path / "hf", tmp_path / "native")
    consolidate(tmp_path / "native", tmp_path / "consolidated")
    NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "saved")
    for written in ("consolidated", "saved"):
        assert (tmp_path / written / code.name).read_bytes() == code.read_bytes()
        assert json.loads((tmp_path / written / "config.json").read_text())["auto_map"] == auto_map


def _load_compute_and_save(source: Path, mesh: MeshConfig, saved: Path) -> torch.Tensor:
    model = NeMoAutoModelForCausalLM.from_pretrained(source, device_mesh=mesh)
    expected = logits(model)
    model.save_pretrained(saved, max_shard_size="30KB")
    return expected


@needs_transformers_5
@pytest.mark.parametrize("mesh", [MeshConfig(dp_shard=1, ep=2), MeshConfig(dp_shard=2, ep=2)], ids=["ep2", "fsdp2ep2"])
def test_a_mesh_loads_computes_and_saves_the_same_model(tmp_path: Path, mesh: MeshConfig) -> None:
    theirs, _ = pair("nemotron_h latent experts")
    theirs.save_pretrained(tmp_path / "hf")
    ranks = run_ranks(mesh.dp_shard * mesh.ep, _load_compute_and_save, tmp_path / "hf", mesh, tmp_path / "saved")
    assert all(relative(found, logits(theirs)) < 1e-5 for found in ranks)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert same(again, theirs.state_dict())


def _save_and_resume(repository: Path, checkpoint: Path) -> list[str]:
    """Saves as training does, resumes from it, and returns the names that differ."""
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
                checkpoint, state, family="nemotron_h", side_files=source.side_files(), source=source.origin
            )
        else:
            assert load_checkpoint(checkpoint, model, optimizer) == STATE
        models.append(tensors_by_name(model))
    first, second = ({name: local(tensor) for name, tensor in found.items()} for found in models)
    return [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])]


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@needs_transformers_5
def test_a_run_resumes_and_is_published_with_all_that_its_checkpoint_has(tmp_path: Path) -> None:
    tensors = write(tmp_path / "hf", predict=True)
    assert run_ranks(2, _save_and_resume, tmp_path / "hf", tmp_path / "step-1") == [[], []]
    consolidate(tmp_path / "step-1", tmp_path / "published")
    assert same(load_file(tmp_path / "published" / MODEL), tensors)


@needs_transformers_5
def test_fresh_state_spaces_start_as_those_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.NemotronHConfig(**NEMOTRON_H))
    config = transformers.NemotronHConfig(**NEMOTRON_H)
    fresh = NeMoAutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for layer in (0, 3):
        ours, wanted = fresh.model.layers[layer].mixer.ssm, theirs.model.layers[layer].mixer
        assert ours.A_log.dtype == torch.float32
        assert torch.equal(ours.A_log, wanted.A_log)
        assert torch.equal(ours.D, wanted.D)
        for steps in (torch.nn.functional.softplus(bias) for bias in (ours.dt_bias, wanted.dt_bias)):
            assert steps.min() >= config.time_step_min * 0.99
            assert steps.max() <= config.time_step_max * 1.01
    assert not torch.equal(fresh.model.layers[0].mixer.ssm.dt_bias, fresh.model.layers[3].mixer.ssm.dt_bias)
    fresh.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["hybrid_override_pattern"], written["num_hidden_layers"]) == ("ME*M-", 5)
    assert written["architectures"] == ["NemotronHForCausalLM"]


@needs_transformers_5
def test_padding_does_not_reach_a_state_through_the_biases_of_projections() -> None:
    torch.manual_seed(0)
    ours = NATIVE_MODELS["nemotron_h"](transformers.NemotronHConfig(**NEMOTRON_H, use_bias=True)).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith("in_proj.bias"):
            parameter.data.normal_()
    ids, mask = tokens(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[:, :5] = 0
    with torch.no_grad():
        padded, alone = ours(ids, attention_mask=mask).logits[:, 5:], ours(ids[:, 5:]).logits
    assert relative(padded, alone) < 1e-5


@needs_transformers_5
def test_the_cache_holds_the_inputs_of_the_convolution_and_a_float32_state() -> None:
    _, ours = pair("nemotron_h", dtype=torch.bfloat16)
    with torch.no_grad():
        cache = ours(tokens(2, 7), use_cache=True).past_key_values
    config = ours.config
    channels = config.mamba_num_heads * config.mamba_head_dim + 2 * config.n_groups * config.ssm_state_size
    assert cache.get_conv_state(0).shape == (2, channels, config.conv_kernel)
    state = cache.get_recurrent_state(0)
    assert state.shape == (2, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
    assert state.dtype == torch.float32
    assert cache.get_seq_length() == 7


@needs_transformers_5
def test_packed_rows_shorter_than_the_convolution_make_a_cache_too() -> None:
    _, ours = pair("nemotron_h")
    ids = tokens(1, 3)
    with torch.no_grad():
        packed = ours(ids, position_ids=torch.tensor([[0, 0, 1]]), use_cache=True).logits
        alone = torch.cat([ours(ids[:, :1]).logits, ours(ids[:, 1:]).logits], dim=1)
    assert relative(packed, alone) < 1e-5


@needs_transformers_5
def test_a_prepared_mask_is_refused_because_it_does_not_say_what_is_padding() -> None:
    _, ours = pair("nemotron_h")
    with pytest.raises(UsageError, match="prepared attention mask"):
        ours(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


@needs_transformers_5
def test_an_activation_that_is_not_computed_is_refused() -> None:
    with pytest.raises(UsageError, match="mamba_hidden_act='gelu'"):
        NATIVE_MODELS["nemotron_h"](transformers.NemotronHConfig(**NEMOTRON_H, mamba_hidden_act="gelu"))


@needs_transformers_5
def test_the_backend_report_tells_what_scans() -> None:
    rows = {row.layer: row for row in pair("nemotron_h")[1].backend_report().rows}
    assert {name: row.count for name, row in rows.items()} == {
        "attention": 1,
        "mamba": 2,
        "experts": 1,
        "router": 1,
        "packed or windowed": 1,
        "norm": 6,
        "linear": 11,
        "layers": 3,
        "loss": 1,
        "layers that scan": 2,
    }
    assert (rows["mamba"].kernel, rows["mamba"].reason) == ("torch", "the fused kernels do not run on cpu")


@pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 has Nemotron-H")
def test_transformers_4_says_that_nemotron_h_needs_transformers_5(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "hf", "nemotron_h")
    assert "nemotron_h" not in NATIVE_MODELS
    with pytest.raises(UsageError, match="nemotron_h needs transformers 5") as error:
        NeMoAutoModelForCausalLM.from_pretrained(source)
    assert "ckpt" in (error.value.hint or "")
    assert roundtrip(source, work=tmp_path, mesh="dp_shard=2,ep=2").tensors > 0
