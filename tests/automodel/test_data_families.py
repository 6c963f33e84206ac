"""Families without a native model: transformers' own classes, loaded, trained and saved by parts through their layout.

Runs under transformers 4, which holds the tensors of the files, and 5, which holds stacked experts.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from automodel import MeshConfig, NeMoAutoModelForCausalLM
from automodel.compat import TRANSFORMERS_5
from automodel.parallel.grad_norm import global_grad_norm
from automodel.training import run
from ckpt_tools import consolidate, convert, inspect, verify
from ckpt_tools.families import FAMILIES, get_family
from tests.automodel.helpers import relative, tokens
from tests.automodel.ranks import run_ranks
from tests.automodel.tiny import VOCABULARY
from tests.automodel.training.test_loop import TEXT, save_tokenizer, write_config
from tests.checkpoints import CONFIGS
from tests.engine.test_quantised import make_quantised

KNOWN = [
    name
    for name in FAMILIES
    if get_family(name).data_only and get_family(name).model_types[0] in transformers.CONFIG_MAPPING
]
every_family = pytest.mark.parametrize("family", KNOWN)
MESH = MeshConfig(dp_shard=2)


def stock(family: str, root: Path | None = None, **changes: Any) -> transformers.PreTrainedModel:
    """transformers' model of a tiny config with random weights, norms and biases too; saved to `root` if given."""
    fields = {**CONFIGS[family], "vocab_size": 97, "initializer_range": 0.1, **changes}
    fields = {key: value for key, value in fields.items() if key not in ("model_type", "torch_dtype", "dtype")}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(get_family(family).model_types[0], **fields, **ids)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # Not a BF16 number.
                buffer.copy_(torch.rand_like(buffer) * 0.3 + 2**-12)
    if root is not None:
        model.save_pretrained(root)
    return model


def same_state(model: transformers.PreTrainedModel, other: transformers.PreTrainedModel) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _warnings() -> list[str]:
    """Collects what the package warns of from now on."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("automodel").addHandler(handler)
    return said


def _on_mesh(source: Path, saved: Path) -> dict[str, Any]:
    said = _warnings()
    model = NeMoAutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_mesh=MESH)
    ids = tokens(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(saved, max_shard_size="30KB")
    model.train()
    mine = ids[dist.get_rank()][None]
    loss = model(mine, labels=mine).loss
    loss.backward()
    return {
        "said": said,
        "logits": logits,
        "sharded": all(isinstance(parameter, DTensor) for parameter in model.parameters()),
        "loss": loss.item(),
        "norm": float(global_grad_norm(model, MESH.build())),
        "gradients": {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None},
    }


@every_family
def test_two_processes_load_by_parts_and_compute_what_transformers_does_and_save_what_it_loads(
    family: str, tmp_path: Path
) -> None:
    theirs = stock(family, tmp_path / "source")
    ids = tokens(2, 9)
    out = theirs.train()(ids, labels=ids)
    out.loss.backward()
    # In transformers 4 an expert without tokens has no gradient at all.
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    norm = float(torch.cat([gradient.flatten() for gradient in expected.values()]).norm())
    results = run_ranks(2, _on_mesh, tmp_path / "source", tmp_path / "saved")
    for got in results:
        assert got["said"] == []
        assert got["sharded"]
        assert relative(got["logits"], out.logits) < 1e-5
        assert got["norm"] == pytest.approx(norm, rel=1e-5)
        assert got["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative(got["gradients"][name], gradient) < 1e-4, name
    assert sum(got["loss"] for got in results) / 2 == pytest.approx(out.loss.item(), rel=1e-5)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same_state(again, theirs)
    verify(tmp_path / "saved", against=tmp_path / "source")


def _native(source: Path) -> torch.Tensor:
    model = NeMoAutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_mesh=MESH)
    with torch.no_grad():
        return model(tokens(2, 9)).logits


@every_family
def test_a_native_checkpoint_loads_in_one_process_and_on_a_mesh(family: str, tmp_path: Path) -> None:
    theirs = stock(family, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "native", mesh="dp_shard=2,ep=2")
    assert (inspect(tmp_path / "native").family, inspect(tmp_path / "native").side) == (family, "native")
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=torch.float32)
    assert same_state(ours, theirs)
    with torch.no_grad():
        expected = theirs(tokens(2, 9)).logits
        assert torch.equal(ours(tokens(2, 9)).logits, expected)
    ours.save_pretrained(tmp_path / "saved")
    verify(tmp_path / "saved", against=tmp_path / "source")
    for logits in run_ranks(2, _native, tmp_path / "native"):
        assert relative(logits, expected) < 1e-5


@pytest.mark.parametrize("family", [family for family in KNOWN if family in ("glm4_moe", "minimax_m2")])
def test_what_two_processes_train_is_consolidated_into_what_transformers_loads(family: str, tmp_path: Path) -> None:
    source = tmp_path / "source" / "model"
    stock(family, source, vocab_size=VOCABULARY)
    save_tokenizer(source)
    (tmp_path / "source" / "text.txt").write_text(TEXT)
    exported = tmp_path / "exported"
    run_ranks(2, run, write_config(tmp_path, source, steps=2, global_batch_size=2, export_dir=str(exported)))
    step = tmp_path / "out" / "step-000002"
    found = inspect(step)
    assert (found.family, found.side) == (family, "native" if TRANSFORMERS_5 else "hf")
    assert json.loads((step / "ckpt-manifest.json").read_bytes())["side"] == found.side
    consolidate(step, tmp_path / "published")
    verify(tmp_path / "published", against=exported)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "published", exported, source)
    ]
    assert same_state(models[0], models[1])
    assert not same_state(models[0], models[2])


def test_a_run_resumes_in_one_process_and_exports_what_both_transformers_read(tmp_path: Path) -> None:
    source = tmp_path / "source" / "model"
    stock("glm4_moe", source, vocab_size=VOCABULARY)
    save_tokenizer(source)
    (tmp_path / "source" / "text.txt").write_text(TEXT)
    config = write_config(tmp_path, source, steps=1, global_batch_size=2)
    exported = tmp_path / "exported"
    for steps, processes, more in ((1, 2, []), (2, 1, [f"export_dir={exported}"])):
        reports = run_ranks(processes, run, config, [f"steps={steps}", *more])
        assert {report.first_step for report in reports} == {steps}
        assert {report.model_class for report in reports} == {"Glm4MoeForCausalLM"}
    verify(exported, against=tmp_path / "out" / "step-000002")
    assert json.loads((exported / "config.json").read_bytes()).keys() >= {"rope_theta", "rope_parameters"}


def with_predict_layer(root: Path) -> Path:
    """The repository of a GLM with a layer for multi-token prediction, as published."""
    stock("glm4_moe", root)
    config = json.loads((root / "config.json").read_text())
    tensors = load_file(root / "model.safetensors")
    for name, leaf in get_family("glm4_moe").layout(config).leaves.items():
        if name not in tensors:
            assert name.startswith("model.layers.3.")
            tensors[name] = torch.randn(leaf.shape)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return root


def test_a_layer_for_multi_token_prediction_outlives_conversion_and_is_said_to_be_left_out_of_a_model(
    tmp_path: Path,
) -> None:
    source = with_predict_layer(tmp_path / "source")
    convert(source, tmp_path / "native")
    consolidate(tmp_path / "native", tmp_path / "back")
    verify(tmp_path / "back", against=source)
    for result in run_ranks(2, _on_mesh, source, tmp_path / "saved"):
        (said,) = result["said"]
        assert "layers for multi-token prediction are not loaded" in said
    assert not any("layers.3." in name for name in load_file(next((tmp_path / "saved").glob("*-00001-*"))))


def _in_bf16(source: Path, saved: Path) -> torch.Tensor:
    model = NeMoAutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_mesh=MESH)
    model.save_pretrained(saved)
    fresh = NeMoAutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16, device_mesh=MESH)
    biases = [{n: b for n, b in m.named_buffers() if n.endswith("correction_bias")} for m in (model, fresh)]
    assert all(b.dtype == torch.float32 for found in biases for b in found.values())
    return next(iter(biases[0].values()))


@pytest.mark.parametrize("family", [family for family in KNOWN if family in ("glm4_moe", "minimax_m2")])
def test_the_correction_bias_of_routing_stays_in_fp32(family: str, tmp_path: Path) -> None:
    theirs = stock(family, tmp_path / "source")
    bias = next(b for n, b in theirs.named_buffers() if n.endswith("correction_bias"))
    assert not torch.equal(bias, bias.bfloat16().float())
    for found in run_ranks(2, _in_bf16, tmp_path / "source", tmp_path / "saved"):
        assert torch.equal(found, bias)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for n, tensor in saved.items() if n.endswith("correction_bias")} == {torch.float32}


@pytest.mark.skipif("minimax_m2" not in KNOWN, reason="this transformers has no MiniMax-M2")
def test_a_dequantised_native_checkpoint_loads_and_is_saved_as_a_plain_repository(tmp_path: Path) -> None:
    convert(make_quantised(tmp_path / "source", "minimax_m2"), tmp_path / "native", dequantize=True)
    model = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    verify(tmp_path / "saved", against=tmp_path / "native")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_bytes())
