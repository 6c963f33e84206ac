"""`ckpt doctor` reports what works, goes on after what does not, and ends with the code of the first problem."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ckpt_tools.api import GpuReport, LayerReport, ModelReport, TrainingReport
from ckpt_tools.cli import doctor as verb
from ckpt_tools.core import packages
from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.packages import PackageReport
from tests.checkpoints import make_repository
from tests.cli.conftest import Run
from tests.quantised import make_quantised

STEP = "pip install flash-attn-4"
KERNELS = (PackageReport("flash-attn-4", None, "attention", STEP),)


class TrainingHalf(ModuleType):
    """Stands in for `automodel.doctor`, which needs torch."""

    def __init__(self) -> None:
        super().__init__("automodel.doctor")
        self.error: Exception | None = None
        self.asked: list[str] = []

    def examine_training(self) -> TrainingReport:
        sys.stdout.write("a library prints\n")
        layers = (LayerReport("sdpa", None, "cudnn", "FlashAttention-4 is not installed"),)
        gpus = (GpuReport("NVIDIA H200", "9.0", 150_000_000_000),) * 2
        return TrainingReport({"torch": "2.13.0"}, gpus, "", KERNELS, "cuda", "bfloat16", layers, (STEP,))

    def examine_model(self, source: str) -> ModelReport:
        self.asked.append(source)
        if self.error is not None:
            raise self.error
        layers = (LayerReport("experts", 2, "fused", ""),)
        return ModelReport("NeMoQwen3MoeForCausalLM", True, "", 36_880, "cuda", "bfloat16", layers, ())


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> TrainingHalf:
    module = TrainingHalf()
    monkeypatch.setitem(sys.modules, "automodel.doctor", module)
    monkeypatch.setattr(packages, "is_found", bool)
    return module


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_found", lambda name: name not in ("torch", "transformers"))


@pytest.mark.usefixtures("half")
def test_the_machine_is_shown_with_the_next_step(ckpt: Run, tmp_path: Path) -> None:
    ran = ckpt("doctor", "--path", tmp_path)
    assert ran.code == 0
    assert f"outputs   {tmp_path}" in ran.stdout
    assert "GPUs      2 x NVIDIA H200, compute capability 9.0, 150 GB" in ran.stdout
    assert "sdpa   cudnn  FlashAttention-4 is not installed" in ran.stdout
    assert ran.stdout.endswith(f"next steps\n  {STEP}\n")
    assert ran.stderr == "a library prints\n"


def test_a_model_is_shown_with_its_own_layers(ckpt: Run, repository: Path, half: TrainingHalf) -> None:
    ran = ckpt("doctor", repository)
    assert (ran.code, half.asked) == (0, [str(repository)])
    for line in (
        "family    Qwen3-MoE (qwen3_moe)",
        "structure: 56 tensors, each element there exactly once",
        "runs      NeMoQwen3MoeForCausalLM, native",
        "experts  2      fused  -",
    ):
        assert line in ran.stdout.replace("family   ", "family    ").replace("runs     ", "runs      "), line
    assert "sdpa" not in ran.stdout


def test_json_has_all_of_it(ckpt: Run, native: Path, half: TrainingHalf) -> None:
    del half
    found = ckpt("doctor", native, "--json").json
    assert set(found) == {"tools", "training", "checkpoint", "model", "problems"}
    assert found["problems"] == []
    assert found["training"]["next_steps"] == [STEP]
    assert (found["checkpoint"]["format"], found["checkpoint"]["tensors"]) == ("dcp", 56)
    assert found["model"]["layers"][0]["kernel"] == "fused"
    assert found["tools"]["threads"] >= 2
    assert {"xxhash", "numpy"} <= {package["name"] for package in found["tools"]["packages"]}


@pytest.mark.usefixtures("without_torch")
def test_without_torch_the_tools_are_shown_and_how_to_train(ckpt: Run) -> None:
    ran = ckpt("doctor")
    assert ran.code == 0
    assert "training needs torch and transformers, which this Python does not have" in ran.stdout
    assert f"{sys.executable} -m pip install 'nemo-automodel-ckpt[train]'" in ran.stdout
    assert "packages  huggingface-hub" in ran.stdout
    as_json = ckpt("doctor", "--json")
    assert (as_json.code, as_json.json["training"]) == (0, None)
    assert [problem["exit_code"] for problem in as_json.json["problems"]] == [1]


@pytest.mark.usefixtures("without_torch")
def test_without_torch_a_model_is_checked_and_cannot_be_trained(ckpt: Run, repository: Path) -> None:
    ran = ckpt("doctor", repository)
    assert ran.code == 1
    assert "structure: 56 tensors" in ran.stdout
    assert "runs     no: it cannot be trained here" in ran.stdout
    assert ran.stderr.startswith("error: training needs torch and transformers")


def test_a_process_without_torch_imports_nothing_heavy(repository: Path, tmp_path: Path) -> None:
    program = """if True:
        import sys
        sys.modules |= dict.fromkeys(("torch", "transformers"))
        from ckpt_tools.cli import main
        sys.argv = ["ckpt", "doctor", *sys.argv[1:], "--json"]
        try:
            main()
        finally:
            print(*(n for n in ("automodel", "safetensors", "numpy", "rich") if n in sys.modules), file=sys.stderr)
    """
    command = [sys.executable, "-c", program, str(repository), "--path", str(tmp_path)]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "\n")
    assert json.loads(ran.stdout)["checkpoint"]["tensors"] == 56


def test_torch_that_cannot_be_imported_is_said_and_is_no_defect(
    ckpt: Run, half: TrainingHalf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    del half
    monkeypatch.setattr(verb, "import_module", fail)
    ran = ckpt("doctor")
    assert ran.code == 0
    assert "training cannot run: OSError: libcudart.so.13: cannot open shared object file" in ran.stdout


def test_a_damaged_model_has_the_code_of_its_damage_and_the_rest_is_shown(
    ckpt: Run, half: TrainingHalf, tmp_path: Path
) -> None:
    damaged = make_repository(tmp_path / "damaged")
    lost = sorted(damaged.glob("*.safetensors"))[1]
    lost.unlink()
    ran = ckpt("doctor", damaged)
    assert (ran.code, half.asked) == (3, [str(damaged)])
    assert "weights  not whole" in ran.stdout
    assert "NeMoQwen3MoeForCausalLM, native" in ran.stdout
    assert f"{lost.name}: the index lists this file, which does not exist" in ran.stderr
    as_json = ckpt("doctor", damaged, "--json")
    assert (as_json.code, as_json.json["problems"][0]["exit_code"]) == (3, 3)
    assert as_json.json["checkpoint"]["problem"] == as_json.json["problems"][0]


def test_a_model_that_cannot_be_trained_has_the_code_of_that(ckpt: Run, repository: Path, half: TrainingHalf) -> None:
    half.error = UsageError("qwen3_moe needs transformers 9", hint="pip install 'transformers>=9'")
    ran = ckpt("doctor", repository)
    assert ran.code == 2
    assert "each element there exactly once" in ran.stdout
    assert ran.stderr.endswith("error: qwen3_moe needs transformers 9\nhint: pip install 'transformers>=9'\n")


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize("named", ["", "config.json"])
def test_a_config_alone_has_no_weights_to_check(ckpt: Run, repository: Path, tmp_path: Path, named: str) -> None:
    (tmp_path / "config.json").write_bytes((repository / "config.json").read_bytes())
    found = ckpt("doctor", tmp_path / named, "--json").json["checkpoint"]
    assert (found["family"], found["tensors"], found["nbytes"]) == ("qwen3_moe", 56, 0)
    assert found["checks"] == ["config.json alone: there are no weights to check"]
    assert found["root"] == str(tmp_path)


@pytest.mark.usefixtures("half")
def test_the_form_of_quantised_weights_is_named(ckpt: Run, tmp_path: Path) -> None:
    assert (
        "weights  safetensors, fp8, " in ckpt("doctor", make_quantised(tmp_path / "model", "qwen3_moe", "fp8")).stdout
    )


def test_a_url_is_checked_where_it_is_and_handed_on_as_one(ckpt: Run, repository: Path, half: TrainingHalf) -> None:
    ran = ckpt("doctor", repository.as_uri())
    assert (ran.code, half.asked) == (0, [repository.as_uri()])
    assert "structure: 56 tensors" in ran.stdout


@pytest.mark.usefixtures("half")
def test_a_directory_without_a_model_is_not_found(ckpt: Run, tmp_path: Path) -> None:
    assert ckpt("doctor", tmp_path / "absent").code == 11
    empty = ckpt("doctor", tmp_path)
    assert (empty.code, "holds no *.safetensors file" in empty.stderr) == (11, True)


def test_tools_that_lack_a_package_name_it(ckpt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_found", lambda name: name != "xxhash")
    ran = ckpt("doctor")
    assert (ran.code, "ckpt needs xxhash, which this Python does not have" in ran.stderr) == (1, True)
