"""Checkpoints of other trainers become the published repository bit for bit, whoever named and arranged the tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_tools import consolidate, convert, diff, explain, inspect, plan, verify
from ckpt_tools.core.errors import CkptError, LayoutError, MismatchError, NotFoundError, UsageError
from ckpt_tools.families import FAMILIES, get_family
from ckpt_tools.families.dialects import DIALECTS
from tests.checkpoints import CONFIGS, make_repository, tensor_bytes
from tests.dialects import writers
from tests.dialects.writers import Config, State, equal, save, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
PLAIN_LLAMA: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
WRITERS: dict[str, tuple[Callable[[State, Config], State], tuple[str, ...]]] = {
    "transformers": (writers.in_memory, ("qwen3_moe", "mixtral", "deepseek_v3", "qwen3_next", "qwen3_5_moe")),
    "torchtitan": (writers.torchtitan, ("llama", "qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss")),
    "torchtitan-0.2": (writers.torchtitan_02, ("llama", "qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss")),
    "nemo-automodel": (writers.nemo_automodel, ("qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss")),
    "torchtune": (writers.torchtune, ("llama", "qwen2")),
}
CASES = [(dialect, family) for dialect, (_, families) in WRITERS.items() for family in families]
OPTIMIZER = {
    "state": {"lm_head.weight": {"exp_avg": torch.zeros(3), "step": torch.zeros(())}},
    "param_groups": [{"lr": 0.1}],
}


def repository(root: Path, family: str, **changes: Any) -> Path:
    """A tiny repository of a config that trainers have names for."""
    changes = {**(PLAIN_LLAMA if family == "llama" else {}), **changes}
    return make_repository(root / "source", family, **changes)


def config_of(source: Path) -> Config:
    return json.loads((source / "config.json").read_text())


def written(source: Path, dialect: str) -> State:
    """What a trainer of that dialect holds of a repository."""
    return WRITERS[dialect][0](tensors_of(source), config_of(source))


@pytest.mark.parametrize(("dialect", "family"), CASES)
def test_a_trainers_checkpoint_becomes_the_repository_it_started_from(
    tmp_path: Path, dialect: str, family: str
) -> None:
    source = repository(tmp_path, family, tie_word_embeddings=False, num_nextn_predict_layers=0)
    saved = save({"model": written(source, dialect), "optimizer": OPTIMIZER}, tmp_path / "saved")
    report = consolidate(saved, tmp_path / "out", like=source)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (report.dialect, report.prefix, report.skipped) == (dialect, "model.", 3)
    verify(saved, like=source, against=source)
    assert diff(saved, source, like=source) == []


@pytest.mark.parametrize(("dialect", "family"), [("torchtitan", "qwen3_moe"), ("nemo-automodel", "gpt_oss")])
def test_it_also_becomes_a_native_checkpoint_for_any_mesh(tmp_path: Path, dialect: str, family: str) -> None:
    source = repository(tmp_path, family)
    saved = save(written(source, dialect), tmp_path / "saved")
    convert(saved, tmp_path / "native", mesh="dp_shard=2,ep=2", like=source)
    assert inspect(tmp_path / "native").dialect == "native"
    verify(tmp_path / "native", against=source)


def test_prediction_layers_borrow_the_embeddings_and_the_head_that_torchtitan_does_not_save(tmp_path: Path) -> None:
    source = repository(tmp_path, "deepseek_v3")
    saved = save(written(source, "torchtitan"), tmp_path / "saved")
    consolidate(saved, tmp_path / "out", like=source)
    out, expected = tensors_of(tmp_path / "out"), tensors_of(source)
    expected["model.layers.3.embed_tokens.weight"] = expected["model.embed_tokens.weight"]
    expected["model.layers.3.shared_head.head.weight"] = expected["lm_head.weight"]
    assert equal(out, expected)
    (found,) = explain(saved, "model.layers.3.embed_tokens.weight", like=source)
    assert found.rule == "not stored: the values of model.embed_tokens.weight"


def test_a_routing_bias_without_a_place_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    source = repository(tmp_path, "qwen3_moe")
    state = written(source, "torchtitan") | {"layers.0.moe.expert_bias_E": torch.ones(4)}
    report = consolidate(save(state, tmp_path / "saved"), tmp_path / "out", like=source)
    assert "routing bias" in report.dropped["layers.0.moe.expert_bias_E"]
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)


@pytest.mark.parametrize(
    ("dialect", "family", "embeddings"),
    [("torchtitan", "qwen3", "tok_embeddings.weight"), ("transformers", "mixtral", "model.embed_tokens.weight")],
)
def test_a_tied_head_that_is_saved_too_must_equal_the_embeddings(
    tmp_path: Path, dialect: str, family: str, embeddings: str
) -> None:
    source = repository(tmp_path, family, tie_word_embeddings=True)
    state = written(source, dialect)
    state["lm_head.weight"] = state[embeddings].clone()
    consolidate(save(state, tmp_path / "saved"), tmp_path / "out", like=source)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)
    state["lm_head.weight"] = torch.zeros_like(state["lm_head.weight"])
    with pytest.raises(MismatchError, match=rf"ties lm_head\.weight to {embeddings}"):
        consolidate(save(state, tmp_path / "other"), tmp_path / "again", like=source)


def test_mxfp4_is_made_of_another_trainers_gpt_oss_as_of_our_own(tmp_path: Path) -> None:
    source = repository(tmp_path, "gpt_oss")
    tame = {name: torch.randn(tensor.shape).bfloat16() for name, tensor in tensors_of(source).items()}
    for dialect in ("torchtitan", "nemo-automodel"):
        state = WRITERS[dialect][0](tame, config_of(source))
        consolidate(save(state, tmp_path / dialect), tmp_path / f"{dialect}-4", like=source, quantize="mxfp4")
        consolidate(tmp_path / dialect, tmp_path / f"{dialect}-plain", like=source)
        assert equal(tensors_of(tmp_path / f"{dialect}-plain"), tame)
    convert(tmp_path / "torchtitan-plain", tmp_path / "native")
    consolidate(tmp_path / "native", tmp_path / "ours", quantize="mxfp4")
    assert tensor_bytes(tmp_path / "torchtitan-4") == tensor_bytes(tmp_path / "ours")
    assert tensor_bytes(tmp_path / "nemo-automodel-4") == tensor_bytes(tmp_path / "ours")


@pytest.mark.parametrize(
    ("prefix", "wrapped"),
    [
        ("module.", lambda name: f"module.{name}"),  # DDP
        ("_orig_mod.", lambda name: f"_orig_mod.{name}"),  # torch.compile
        ("layers", lambda name: name.replace("self_attn.", "_orig_mod.self_attn.")),  # compiled layer by layer
        ("fsdp1", lambda name: "_fsdp_wrapped_module." + name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
        ("checkpointing", lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp.")),
        ("fabric", lambda name: f"_forward_module.module.{name}"),
        ("lightning", lambda name: f"net.{name}"),  # the attribute of a LightningModule, under state_dict
        ("deep", lambda name: f"trainer.policy.{name}"),
    ],
)
@pytest.mark.parametrize("dialect", ["hf", "transformers"])
def test_what_wrappers_put_into_names_is_taken_out(
    tmp_path: Path, prefix: str, wrapped: Callable[[str], str], dialect: str
) -> None:
    source = repository(tmp_path, "qwen3_moe")
    state = tensors_of(source) if dialect == "hf" else written(source, dialect)
    saved = save({"state_dict": {wrapped(name): t for name, t in state.items()}}, tmp_path / "saved")
    report = consolidate(saved, tmp_path / "out", like=source)
    assert report.dialect == dialect, prefix
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)


def test_two_names_that_are_one_without_wrappers_are_an_error(tmp_path: Path) -> None:
    source = repository(tmp_path, "qwen3")
    state = tensors_of(source) | {"module.model.norm.weight": torch.zeros(32)}
    with pytest.raises(CkptError, match=r"both model\.norm\.weight without wrappers"):
        consolidate(save(state, tmp_path / "saved"), tmp_path / "out", like=source)


def test_an_unknown_architecture_keeps_the_names_of_its_own_state_dict(tmp_path: Path) -> None:
    state = {"model.embed.weight": torch.ones(2, 3), "head.weight": torch.ones(3)}
    (tmp_path / "like").mkdir()
    (tmp_path / "like/config.json").write_text('{"model_type": "new"}')
    consolidate(save({"model": state}, tmp_path / "saved"), tmp_path / "out", like=tmp_path / "like")
    assert equal(tensors_of(tmp_path / "out"), state)


def test_without_a_config_the_error_asks_for_one(tmp_path: Path) -> None:
    saved = save({"model": tensors_of(repository(tmp_path, "qwen3"))}, tmp_path / "saved")
    with pytest.raises(NotFoundError, match=r"no config\.json") as error:
        consolidate(saved, tmp_path / "out")
    assert "--like" in str(error.value.hint)


def test_the_folder_around_the_model_may_be_given_and_hold_the_config(tmp_path: Path) -> None:
    source = repository(tmp_path, "mixtral")
    outer = tmp_path / "checkpoint-10"
    save({"model": written(source, "transformers")}, outer / "pytorch_model_fsdp_0")
    save({"optimizer": OPTIMIZER}, outer / "optimizer_0")
    for name in ("config.json", "tokenizer.json"):
        (outer / name).write_bytes((source / name).read_bytes())
    consolidate(outer, tmp_path / "out")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)
    assert (tmp_path / "out/tokenizer.json").exists()


def test_nemos_sharded_safetensors_are_read_with_the_config_they_carry(tmp_path: Path) -> None:
    source = repository(tmp_path, "qwen3_moe")
    model = tmp_path / "epoch_0_step_10/model"
    writer = torch.distributed.checkpoint.HuggingFaceStorageWriter(path=str(model), save_distributed=True)
    torch.distributed.checkpoint.save(tensors_of(source), storage_writer=writer, no_dist=True)
    (model / ".hf_metadata").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / ".hf_metadata" / name).write_bytes((source / name).read_bytes())
    report = consolidate(model.parent, tmp_path / "out")
    assert report.dialect == "hf"
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)


def test_two_dialects_that_fit_have_to_be_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = repository(tmp_path, "qwen3")
    saved = save(written(source, "torchtitan"), tmp_path / "saved")
    monkeypatch.setitem(DIALECTS, "twin", replace(DIALECTS["torchtitan"], name="twin"))
    with pytest.raises(UsageError, match="read as torchtitan and as twin") as error:
        inspect(saved, like=source)
    assert "--dialect" in str(error.value.hint)
    assert inspect(saved, like=source, dialect="twin").dialect == "twin"


def test_names_that_fit_no_dialect_are_listed_against_the_nearest(tmp_path: Path) -> None:
    source = repository(tmp_path, "qwen3_moe")
    state = written(source, "torchtitan")
    state["layers.0.moe.router.gate.wait"] = state.pop("layers.0.moe.router.gate.weight")
    saved = save({"model": state}, tmp_path / "saved")
    with pytest.raises(LayoutError) as error:
        consolidate(saved, tmp_path / "out", like=source)
    message = str(error.value)
    assert "qwen3_moe model under torchtitan names" in message
    assert "1 missing\n  layers.0.moe.router.gate.weight" in message
    assert "layers.0.moe.router.gate.wait  (nearest expected name: layers.0.moe.router.gate.weight)" in message
    assert "torchtitan-0.2" in str(error.value.hint)


def test_a_dialect_that_is_asked_for_has_to_fit(tmp_path: Path) -> None:
    source = repository(tmp_path, "qwen3_moe")
    saved = save(written(source, "transformers"), tmp_path / "saved")
    assert plan(saved, like=source, dialect="transformers").dialect == "transformers"
    with pytest.raises(LayoutError, match="under torchtitan names"):
        inspect(saved, like=source, dialect="torchtitan")
    with pytest.raises(UsageError, match=r"torchtune 0\.6 has no names for Qwen3-MoE"):
        inspect(saved, like=source, dialect="torchtune")
    with pytest.raises(UsageError, match="no dialect 'torchtitn'") as error:
        inspect(saved, like=source, dialect="torchtitn")
    assert "torchtitan" in str(error.value.hint)


def test_a_config_that_a_trainer_has_no_names_for_is_refused(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "llama")
    plain = repository(tmp_path / "plain", "llama")
    saved = save(written(plain, "torchtitan"), tmp_path / "saved")
    with pytest.raises(
        LayoutError,
        match=r"no names for 14 tensors of such a llama model:\n  model\.layers\.0\.self_attn\.q_proj\.bias",
    ):
        inspect(saved, like=source)


def test_explain_says_what_a_trainers_tensor_is_made_of(tmp_path: Path) -> None:
    source = repository(tmp_path, "llama")
    saved = save(written(source, "torchtitan"), tmp_path / "saved")
    (found,) = explain(saved, "layers.1.attention.qkv_linear.wq.weight", like=source)
    assert found.side == "torchtitan"
    assert found.counterparts == (("model.layers.1.self_attn.q_proj.weight", (32, 32)),)
    assert "halves of each head" in found.rule


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_dialects_of_a_family_have_the_same_names(family: str) -> None:
    config = {**CONFIGS[family], **(PLAIN_LLAMA if family == "llama" else {})}
    chosen = get_family(family)
    names = {"native": chosen.layout(config).native.keys(), "hf": chosen.layout(config).shapes("hf").keys()}
    for name, dialect in DIALECTS.items():
        if family in dialect.families:
            names[name] = chosen.layout(config, dialect=dialect).native.keys()
    same = [pair for pair in combinations(names, 2) if names[pair[0]] == names[pair[1]] and pair != ("native", "hf")]
    assert not same
