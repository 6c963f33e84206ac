"""Every verb, run as from a shell: what it makes, what it says, and where it says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import make_repository, tensor_bytes
from tests.cli.conftest import Run


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_repository_is_converted_and_consolidated_back_to_the_same_bytes(
    ckpt: Run, repository: Path, tmp_path: Path
) -> None:
    native, back = tmp_path / "native", tmp_path / "back"
    there = ckpt("convert", repository, native, "--mesh", "dp_shard=2,ep=2", "--threads", 2, "--memory", "64MB")
    again = ckpt("consolidate", native, back, "--max-shard-size", "30kB")
    assert (there.code, again.code) == (0, 0), there.stderr + again.stderr
    assert "to       Hugging Face, 3 files" in again.stdout
    assert tensor_bytes(back) == tensor_bytes(repository)
    assert f"ckpt verify {native} --against {repository}" in there.stderr
    assert "4 files" in there.stdout


def test_a_native_checkpoint_is_laid_out_for_another_mesh(ckpt: Run, native: Path, tmp_path: Path) -> None:
    ran = ckpt("convert", native, tmp_path / "other", "--mesh", "ep=3", "--format", "safetensors", "--json")
    assert ran.json["files"] == 3
    assert ckpt("verify", tmp_path / "other", "--against", native).code == 0


@pytest.mark.parametrize("verb", ["convert", "consolidate"])
def test_a_dry_run_says_what_would_be_made_and_makes_nothing(
    ckpt: Run, repository: Path, native: Path, tmp_path: Path, verb: str
) -> None:
    ran = ckpt(verb, repository if verb == "convert" else native, tmp_path / "out", "--dry-run")
    assert ran.code == 0
    assert "nothing was written" in ran.stdout
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("verb", ["consolidate", "plan"])
def test_a_reader_that_cannot_be_served_is_refused_with_the_reason(
    ckpt: Run, native: Path, tmp_path: Path, verb: str
) -> None:
    where = ("--to", "hf") if verb == "plan" else (tmp_path / "out",)
    refused = ckpt(verb, native, *where, "--for", "vllm,sglang")
    assert refused.code == 2
    assert "sglang: SGLang ignores `mlp_only_layers` and `decoder_sparse_step`" in refused.stderr
    assert ckpt(verb, native, *where, "--for", "transformers4,transformers5,vllm").code == 0


def test_casting_is_counted(ckpt: Run, repository: Path, tmp_path: Path) -> None:
    ran = ckpt("convert", repository, tmp_path / "out", "--dtype", "fp32", "--json")
    assert ran.json["casts"] == ran.json["tensors"] == 56


def test_an_existing_output_stays_without_overwrite_and_is_replaced_with_it(
    ckpt: Run, repository: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    refused = ckpt("convert", repository, out)
    assert refused.code == 9
    assert "--overwrite" in refused.stderr
    assert listing(out) == {"precious"}
    assert ckpt("convert", repository, out, "--overwrite").code == 0
    assert "precious" not in listing(out)
    assert ckpt("verify", out).code == 0


def test_verify_lists_its_checks(ckpt: Run, repository: Path, native: Path) -> None:
    ran = ckpt("verify", native, "--against", repository)
    assert ran.code == 0
    assert [line.split()[:2] for line in ran.stdout.splitlines()[:-1]] == [
        ["ok", "structure:"],
        ["ok", "digests:"],
        ["ok", "digests:"],
        ["ok", "values:"],
    ]
    assert "digests" not in ckpt("verify", native, "--no-digests").stdout


def test_verify_finds_other_values(ckpt: Run, native: Path, tmp_path: Path) -> None:
    other = make_repository(tmp_path / "other", seed=1)
    ran = ckpt("verify", native, "--against", other)
    assert ran.code == 5
    assert ran.stdout == ""


def test_roundtrip_leaves_nothing_behind(ckpt: Run, repository: Path, tmp_path: Path) -> None:
    ran = ckpt("roundtrip", repository, "--work", tmp_path, "--mesh", "dp_shard=3,ep=2")
    assert ran.code == 0
    assert "equal bit for bit: 56 tensors" in ran.stdout
    assert listing(tmp_path) == set()


def test_plan_takes_the_other_side_unless_it_is_told(ckpt: Run, repository: Path, native: Path) -> None:
    assert ckpt("plan", repository, "--json").json["target_side"] == "native"
    assert ckpt("plan", native, "--json").json["target_side"] == "hf"
    assert ckpt("plan", native, "--to", "native", "--mesh", "ep=2", "--json").json["files"] == 2
    assert "ckpt consolidate" in ckpt("plan", native).stderr


def test_inspect_groups_tensors_by_name(ckpt: Run, repository: Path) -> None:
    ran = ckpt("inspect", repository)
    assert ran.code == 0
    assert "model.layers.*.mlp.experts.*.down_proj.weight       8  BF16   [32, 24]" in ran.stdout
    assert ckpt("inspect", repository, "--json").json["family"] == "qwen3_moe"


def test_diff_is_silent_about_one_model_on_both_sides(ckpt: Run, repository: Path, native: Path) -> None:
    ran = ckpt("diff", repository, native)
    assert (ran.code, ran.stdout) == (0, "the same names, shapes and dtypes\n")


def test_diff_exits_with_5_when_it_lists_a_difference(ckpt: Run, repository: Path, tmp_path: Path) -> None:
    other = make_repository(tmp_path / "other", vocab_size=65)
    ran = ckpt("diff", repository, other)
    assert ran.code == 5
    assert "BF16 [64, 32]" in ran.stdout
    assert "2 differences" in ran.stdout
    differences = ckpt("diff", repository, other, "--json").json["differences"]
    assert {"name": "lm_head.weight", "left": "BF16 [64, 32]", "right": "BF16 [65, 32]"} in differences


def test_explain_names_the_parts_of_a_native_tensor(ckpt: Run, repository: Path) -> None:
    ran = ckpt("explain", repository, "model.layers.0.self_attn.qkv_proj.weight")
    assert ran.code == 0
    assert "  model.layers.0.self_attn.k_proj.weight  [16, 32]" in ran.stdout


def test_families_are_listed_and_one_is_shown(ckpt: Run) -> None:
    assert "Qwen3MoeForCausalLM" in ckpt("families").stdout
    assert "mlp.experts.gate_up_proj" in ckpt("families", "qwen3_moe").stdout
    ran = ckpt("families", "qwen3_mo")
    assert (ran.code, "did you mean qwen3_moe?" in ran.stderr) == (2, True)


def test_an_estimate_needs_a_config_alone(ckpt: Run, repository: Path, native: Path) -> None:
    alone, divided = (ckpt("estimate", repository, *mesh, "--json").json for mesh in ([], ["--mesh", "ep=2"]))
    assert alone["peak"] > alone["parameters"] + alone["optimizer"]
    assert alone["parameters"] == pytest.approx(2 * divided["parameters"], rel=0.05)
    again = ckpt("estimate", native, "--checkpointing", "--json").json
    assert (again["parameters"], again["activations"] < alone["activations"]) == (alone["parameters"], True)
    some = ckpt("estimate", native, "--selective-checkpointing", "--json").json
    assert again["activations"] < some["activations"] < alone["activations"]
    ran = ckpt("estimate", native, "--checkpointing", "--selective-checkpointing")
    assert (ran.code, "exclude each other" in ran.stderr) == (2, True)
    ran = ckpt("estimate", native, "--selective-checkpointing", "--implementation", "transformers")
    assert (ran.code, "of native layers" in ran.stderr) == (2, True)
    assert "GiB  of each of 2 GPUs, at: " in ckpt("estimate", native, "--mesh", "ep=2").stdout
    ran = ckpt("estimate", repository.parent)
    assert (ran.code, "has no config.json" in ran.stderr) == (11, True)


def test_every_look_is_one_json_object_and_nothing_else(ckpt: Run, repository: Path, native: Path) -> None:
    name = "lm_head.weight"
    looks = [
        ("inspect", repository),
        ("plan", repository),
        ("verify", repository),
        ("roundtrip", repository),
        ("diff", repository, native),
        ("explain", repository, name),
        ("families",),
        ("estimate", repository),
    ]
    for look in looks:
        ran = ckpt(*look, "--json")
        assert (ran.code, ran.stderr) == (0, ""), look
        assert ran.stdout.count("\n") == 1, look
        assert isinstance(ran.json, dict), look


def test_quiet_silences_success_but_not_an_answer(ckpt: Run, repository: Path, tmp_path: Path) -> None:
    made = ckpt("convert", repository, tmp_path / "out", "-q")
    assert (made.code, made.stdout, made.stderr) == (0, "", "")
    asked = ckpt("inspect", repository, "--quiet")
    assert "qwen3_moe" in asked.stdout
    both = ckpt("verify", repository, "--quiet", "--json")
    assert (both.json["tensors"], both.stderr) == (56, "")


def test_names_from_a_file_cannot_steer_the_terminal(ckpt: Run, tmp_path: Path) -> None:
    hostile = make_repository(tmp_path / "hostile")
    (hostile / "readme\033[2Jfile").write_text("x")
    ran = ckpt("inspect", hostile)
    assert (ran.code, ran.stdout) == (3, "")
    assert "readme\\x1b[2Jfile" in ran.stderr
    assert "\033" not in ran.stderr
    manifest = {"version": 1, "family": "a", "side": "hf", "tool": "t\033[2Jool", "digest": "d", "layout_version": 1}
    (hostile / "readme\033[2Jfile").unlink()
    (hostile / "ckpt-manifest.json").write_text(json.dumps(manifest))
    shown = ckpt("inspect", hostile)
    assert "\033" not in shown.stdout
    assert "t\\x1b[2Jool" in shown.stdout
