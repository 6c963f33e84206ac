"""The doctor asks the resolvers themselves; GPUs are stood in for, and packages taken away."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from automodel import doctor
from automodel.backends import Backend
from automodel.compat import TRANSFORMERS_5
from automodel.doctor import examine_model, examine_training
from automodel.kernels import packages
from automodel.moe.peers import host_obstacle
from ckpt_tools import convert, inspect
from ckpt_tools.cli.app import app
from ckpt_tools.core.errors import CkptError, UsageError
from tests.checkpoints import make_repository


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Two GPUs that reach each other; returns the packages of kernels that are installed, which a test may change."""
    pytest.importorskip("triton")
    installed = {"triton"}
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150_109_880_320)
    for name, answer in {
        "init": None,
        "is_available": True,
        "device_count": 2,
        "get_device_properties": gpu,
        "get_device_capability": (9, 0),
        "can_device_access_peer": True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(packages, "_found", installed.__contains__)
    return installed


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("No CUDA GPUs are available\nand more")

    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_kind_of_layer_that_a_backend_chooses_has_a_row() -> None:
    chosen = {row.layer.partition(" ")[0] for row in examine_training().layers}
    assert chosen == {field.name for field in fields(Backend)}, "give doctor._resolvers the new kind of layer"


def test_without_a_gpu_the_reason_is_torchs_and_nothing_is_to_be_installed(no_gpu: None) -> None:
    del no_gpu
    report = examine_training()
    assert (report.device, report.gpus, report.obstacle) == ("cpu", (), "No CUDA GPUs are available")
    kernels = {row.layer: row.kernel for row in report.layers}
    assert (kernels["experts"], kernels["layers"], kernels["dispatch"]) == ("grouped_mm", "eager", "all_to_all")
    assert report.next_steps == ()
    assert report.versions["torch"] == torch.__version__


def test_a_torch_without_cuda_beside_a_gpu_is_to_be_replaced(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del no_gpu
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "_DEVICES", tmp_path)
    assert examine_training().next_steps == ()
    (tmp_path / "nvidia0").touch()
    assert f"install torch for CUDA in place of {torch.__version__}" in examine_training().next_steps[0]


def test_on_gpus_the_packages_that_resolvers_missed_are_the_next_steps(h200: set[str]) -> None:
    report = examine_training()
    rows = {row.layer: row for row in report.layers}
    assert rows["experts"].kernel == "fused"
    assert "torch's grouped products multiply" in rows["experts"].reason
    assert rows["dispatch"].kernel == "symmetric"
    assert (rows["sdpa"].kernel, rows["sdpa"].reason) == ("cudnn", "FlashAttention-4 (flash-attn-4) is not installed")
    assert rows["mamba"].reason == "mamba_ssm and causal_conv1d are not installed"
    assert [(gpu.name, gpu.capability) for gpu in report.gpus] == [("NVIDIA H200", "9.0")] * 2
    wanted = ("flash-attn-4", "quack-kernels", "mamba-ssm", "causal-conv1d", "flash-linear-attention")
    assert all(any(name in step for step in report.next_steps) for name in wanted)
    assert not any("triton" in step for step in report.next_steps)
    h200 |= {"flash_attn.cute", "quack", "mamba_ssm", "causal_conv1d", "fla"}
    after = examine_training()
    assert after.next_steps == ()
    assert {row.layer: row.kernel for row in after.layers}["sdpa"] == "flash4"


@pytest.mark.usefixtures("h200")
def test_packages_that_could_not_run_on_this_gpu_are_no_next_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    report = examine_training()
    reasons = {row.layer: row.reason for row in report.layers}
    assert reasons["sdpa"] == "FlashAttention-4 and cuDNN's attention need compute capability 9.0"
    assert not any(name in step for step in report.next_steps for name in ("flash-attn", "quack", "transformer-engine"))


@pytest.mark.usefixtures("h200")
def test_a_native_model_is_reported_as_on_the_gpu_without_being_there(tmp_path: Path) -> None:
    report = examine_model(str(make_repository(tmp_path / "model")))
    assert (report.implementation, report.native, report.reason) == ("NeMoQwen3MoeForCausalLM", True, "")
    assert (report.device, report.dtype) == ("cuda", "bfloat16")
    rows = {row.layer: row for row in report.layers}
    assert (rows["experts"].count, rows["experts"].kernel) == (2, "fused")
    assert rows["dispatch, where ep > 1"].kernel == "symmetric"
    assert rows["attention"].kernel == "sdpa, cuDNN first"
    assert report.next_steps == ("pip install 'flash-attn-4>=4.0.0b1'", "pip install 'quack-kernels>=0.6.2,<0.7'")
    assert report.parameters == inspect(tmp_path / "model").parameters


def test_shapes_of_the_model_decide_and_not_typical_ones(tmp_path: Path, h200: set[str]) -> None:
    del h200
    model = make_repository(tmp_path / "model", moe_intermediate_size=20)
    experts = {row.layer: row for row in examine_model(str(model)).layers}["experts"]
    assert (experts.kernel, "expert width 20" in experts.reason) == ("torch", True)


@pytest.mark.usefixtures("h200")
def test_a_family_without_a_native_model_says_so_and_what_liger_lacks(tmp_path: Path) -> None:
    report = examine_model(str(make_repository(tmp_path / "model", "olmoe")))
    assert (report.implementation, report.native) == ("OlmoeForCausalLM", False)
    assert "olmoe has no native ModelForCausalLM" in report.reason
    assert {row.layer: row.reason for row in report.layers} == {
        "attention": "",
        "other layers": "no Liger kernels: liger-kernel is not installed",
    }
    assert report.next_steps == ("pip install liger-kernel",)


def test_a_native_checkpoint_and_a_config_alone_are_models_too(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "model", "deepseek_v3")
    convert(repository, tmp_path / "native")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_bytes((repository / "config.json").read_bytes())
    native, alone, whole = (examine_model(str(tmp_path / name)) for name in ("native", "config", "model"))
    assert native == whole
    # Whether there are layers for multi-token prediction is told by names alone.
    assert (alone.implementation, alone.parameters < whole.parameters) == (whole.implementation, True)


def test_damaged_weights_do_not_hide_what_would_run(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "model")
    next(iter(sorted(repository.glob("*.safetensors")))).write_bytes(b"\xff" * 64)
    assert examine_model(str(repository)).native


def test_the_verb_reports_what_was_found_here(tmp_path: Path) -> None:
    model = make_repository(tmp_path / "model")
    ran = CliRunner().invoke(app, ["doctor", str(model), "--json"])
    found = json.loads(ran.stdout)
    assert (ran.exit_code, found["problems"]) == (0, [])
    assert found["training"] == json.loads(json.dumps(asdict(examine_training())))
    assert found["model"] == json.loads(json.dumps(asdict(examine_model(str(model)))))
    url = CliRunner().invoke(app, ["doctor", model.as_uri()])
    assert (url.exit_code, "models load from directories and the Hub" in url.stderr) == (2, True)


def _edit(repository: Path, **changes: object) -> str:
    config = json.loads((repository / "config.json").read_text()) | changes
    (repository / "config.json").write_text(json.dumps(config))
    return str(repository)


def test_what_nothing_can_train_is_an_error_with_the_reason(tmp_path: Path) -> None:
    unknown = _edit(make_repository(tmp_path / "unknown"), model_type="no_such_model")
    with pytest.raises(UsageError, match="no_such_model"):
        examine_model(unknown)
    packed = _edit(make_repository(tmp_path / "packed"), quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UsageError, match="gptq"):
        examine_model(packed)


def test_code_of_a_repository_does_not_run(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "model")
    (repository / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    classes = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    hostile = _edit(repository, model_type="no_such_model", auto_map=classes)
    with pytest.raises(UsageError):
        examine_model(hostile)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(TRANSFORMERS_5, reason="transformers 5 has the family")
def test_a_family_that_transformers_is_too_old_for_names_the_version(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="transformers 5"):
        examine_model(str(make_repository(tmp_path / "model", "nemotron_h")))


def test_misses_are_recorded_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_found", {"there"}.__contains__)
    with packages.recorded_misses() as misses:
        assert packages.is_installed("there")
        assert not packages.is_installed("absent")
    packages.is_installed("later")
    assert misses == ["absent"]


@pytest.mark.parametrize(
    ("gpus", "reached", "reason"), [(1, True, "this host has one"), (2, False, "peer access"), (2, True, None)]
)
def test_one_process_tells_whether_its_host_has_peers(
    h200: set[str], monkeypatch: pytest.MonkeyPatch, gpus: int, reached: bool, reason: str | None
) -> None:
    del h200
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: reached)
    found = host_obstacle(torch.device("cuda"))
    assert found is None if reason is None else reason in found


def test_cudnn_that_does_not_fit_torch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise RuntimeError("cuDNN version incompatibility\nand more")

    monkeypatch.setattr(torch.backends.cudnn, "version", fail)
    assert examine_training().versions["cuDNN"] == "unusable (cuDNN version incompatibility)"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_900)
    assert examine_training().versions["cuDNN"] == "9.19.0"


def test_errors_are_those_of_loading(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    with pytest.raises(CkptError):
        examine_model(str(tmp_path / "weights"))
