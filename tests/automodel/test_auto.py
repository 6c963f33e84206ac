"""The auto classes: the same results as transformers' own, from repositories and native checkpoints."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from automodel import NeMoAutoModelForCausalLM, NeMoAutoModelForSequenceClassification, auto
from automodel.compat import TRANSFORMERS_5
from automodel.logging import log_once
from automodel.models import NATIVE_MODELS
from ckpt_tools import convert
from ckpt_tools.core.errors import CkptError, LayoutError, NotFoundError, OutputExistsError, UsageError
from tests.automodel.helpers import CONFIGS, SIZES, every_config, pair, relative, tokens


def repository(root: Path, name: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A repository saved by transformers, and the model it was saved from."""
    theirs, _ = pair(name, dtype=dtype)
    theirs.save_pretrained(root)
    return theirs


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repository_loads_as_the_native_class_with_equal_logits(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = repository(tmp_path, name, dtype)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(ours) is NATIVE_MODELS[theirs.config.model_type]
    assert ours.dtype == dtype
    assert not ours.training
    ids = tokens(2, 9)
    with torch.no_grad():
        expected, actual = theirs(ids).logits, ours(ids).logits
    if dtype == torch.float32:
        assert relative(actual, expected) < 1e-5
        greedy = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(ours.generate(ids, **greedy), theirs.generate(ids, **greedy))


@every_config
def test_what_is_saved_loads_in_transformers_with_nothing_missing(name: str, tmp_path: Path) -> None:
    theirs = repository(tmp_path / "source", name)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "source")
    ours.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == [type(theirs).__name__]
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    state = theirs.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[n]) for n, tensor in again.state_dict().items())


@pytest.mark.parametrize("name", ["qwen3_moe", "llama"])
def test_a_model_from_a_config_is_saved_as_a_repository(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = NeMoAutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    ours.save_pretrained(tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = tokens(1, 7)
    with torch.no_grad():
        assert relative(ours(ids).logits, theirs(ids).logits) < 1e-5


def test_saved_changes_come_back(tmp_path: Path) -> None:
    repository(tmp_path / "source")
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "source")
    with torch.no_grad():
        ours.model.layers[0].mlp.experts.down_proj[3] += 1
        ours.model.layers[2].self_attn.qkv_proj.weight[-1] = 7
    ours.generation_config.max_new_tokens = 5
    ours.save_pretrained(tmp_path / "saved")
    again = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
    assert again.generation_config.max_new_tokens == 5


@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_weights_are_cast_to_the_dtype_that_is_asked_for(given: object, spelling: str, tmp_path: Path) -> None:
    theirs = repository(tmp_path)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path, **{spelling: given})
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight.bfloat16())


def test_the_default_dtype_is_that_of_the_installed_transformers(tmp_path: Path) -> None:
    repository(tmp_path, dtype=torch.bfloat16)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path)
    assert ours.dtype == transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype
    assert ours.dtype == (torch.bfloat16 if TRANSFORMERS_5 else torch.float32)


def test_config_fields_and_attention_can_be_given(tmp_path: Path) -> None:
    repository(tmp_path)
    ours = NeMoAutoModelForCausalLM.from_pretrained(
        tmp_path, output_router_logits=True, attn_implementation="eager", use_cache=False, backend="torch"
    )
    out = ours(tokens(1, 4), output_attentions=True)
    assert out.aux_loss is not None
    assert out.attentions is not None
    assert out.past_key_values is None
    assert {row.layer: row.kernel for row in ours.backend_report().rows}["experts"] == "torch"


def test_loading_information_has_the_form_of_transformers(tmp_path: Path) -> None:
    repository(tmp_path)
    _, info = NeMoAutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())


def test_every_parameter_is_written_or_the_load_fails(tmp_path: Path) -> None:
    repository(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = "model.layers.0.mlp.experts.3.up_proj.weight"
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(LayoutError, match=lost.replace(".", r"\.")):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path)


def test_loaded_parameters_train(tmp_path: Path) -> None:
    repository(tmp_path)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path).train()
    ids = tokens(2, 9)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = ours(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"backend": {"experts": "cutlass"}}, "cutlass"),
        ({"backend": "grouped_mm", "dtype": torch.float64}, "float64"),
        ({"device_map": {"model": 0, "lm_head": 1}}, "device_map"),
        ({"state_dict": {"a": 1}}, "state_dict"),
        ({"no_such_argument": 3}, "no_such_argument"),
        ({"dtype": torch.float32, "torch_dtype": torch.bfloat16}, "disagree"),
        ({"dtype": "float7"}, "float7"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(arguments: dict[str, object], word: str, tmp_path: Path) -> None:
    repository(tmp_path)
    with pytest.raises(UsageError, match=word):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path, **arguments)(tokens(1, 3))


def test_positional_arguments_are_refused_and_harmless_options_are_not(tmp_path: Path) -> None:
    repository(tmp_path)
    with pytest.raises(UsageError, match="positional"):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path, "extra")
    NeMoAutoModelForCausalLM.from_pretrained(
        tmp_path, low_cpu_mem_usage=True, use_safetensors=True, device_map={"": "cpu"}, trust_remote_code=False
    )


def test_forms_that_cannot_be_dequantised_and_quantising_on_loading_are_refused(tmp_path: Path) -> None:
    repository(tmp_path)
    with pytest.raises(UsageError, match="does not quantise"):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path, quantization_config={"quant_method": "fp8"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="gptq"):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        NeMoAutoModelForCausalLM.from_pretrained(str(tmp_path / "nowhere"))


def _snapshot(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[dict[str, object]]:
    """Makes every download give `root`, and records what was asked for."""
    calls: list[dict[str, object]] = []

    def download(name: str, **arguments: object) -> str:
        calls.append({"name": name, **arguments})
        return str(root)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


@pytest.mark.parametrize("options", [{}, {"token": "secret", "cache_dir": "elsewhere", "local_files_only": True}])
def test_a_hub_name_is_downloaded_once_the_config_is_known(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository(tmp_path)
    calls = _snapshot(monkeypatch, tmp_path)
    ours = NeMoAutoModelForCausalLM.from_pretrained("some/model", revision="v2", **options)
    assert ours.name_or_path == "some/model"
    assert [call["name"] for call in calls] == ["some/model"] * 2
    config_only, everything = calls
    assert not any("safetensors" in pattern for pattern in config_only["allow_patterns"])
    assert "*.safetensors" in everything["allow_patterns"]
    assert everything["revision"] == "v2"
    assert {name: everything[name] for name in options} == options


def test_a_subfolder_of_a_directory_is_found(tmp_path: Path) -> None:
    repository(tmp_path / "inner")
    assert NeMoAutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner").config.num_experts == 6
    with pytest.raises(NotFoundError, match="outer"):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path, subfolder="outer")


def test_other_architectures_are_transformers_own_class_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_once.cache_clear()
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="automodel"):
        ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(ours) is transformers.GPT2LMHeadModel
    assert ours.config._attn_implementation == "sdpa"
    text = caplog.text
    assert "gpt2 has no native" in text
    assert "qwen3_moe" in text
    assert "Liger" in text
    fresh = NeMoAutoModelForCausalLM.from_config(config)
    assert type(fresh) is transformers.GPT2LMHeadModel


def test_sequence_classification_uses_transformers(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(**SIZES, num_labels=3)
    theirs = transformers.AutoModelForSequenceClassification.from_config(config)
    theirs.save_pretrained(tmp_path)
    ours = NeMoAutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours(tokens(2, 5), attention_mask=torch.ones(2, 5)).logits.shape == (2, 3)


def test_every_auto_class_has_its_counterpart_in_transformers() -> None:
    classes = [value for name, value in vars(auto).items() if name.startswith("NeMoAutoModelFor")]
    assert len(classes) == 4
    for cls in classes:
        assert cls.__name__ == "NeMo" + cls.transformers_class
        assert hasattr(transformers, cls.transformers_class)
        with pytest.raises(TypeError, match="from_pretrained"):
            cls()


def test_saving_keeps_other_files_of_the_directory_and_the_tokenizer_of_the_source(tmp_path: Path) -> None:
    repository(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "source")
    ours.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "saved" / "tokenizer.json").write_text('{"changed": 1}')
    ours.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == '{"changed": 1}'
    assert not (tmp_path / "saved" / "tokenizer.json").is_symlink()


def test_saving_never_removes_what_it_would_not_write_again(tmp_path: Path) -> None:
    ours = NeMoAutoModelForCausalLM.from_config(CONFIGS["llama"]())
    target = tmp_path / "project"
    (target / ".git").mkdir(parents=True)
    (target / ".git" / "HEAD").write_text("ref")
    with pytest.raises(OutputExistsError, match="HEAD"):
        ours.save_pretrained(target)
    assert (target / ".git" / "HEAD").exists()
    ours.save_pretrained(target, overwrite=True)
    assert (target / "config.json").exists()
    ours.save_pretrained(tmp_path / "empty", checkpointer=object())
    with pytest.raises(UsageError, match="push_to_hub"):
        ours.save_pretrained(tmp_path / "other", push_to_hub=True)


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    def made(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return dict(NeMoAutoModelForCausalLM.from_config(CONFIGS["qwen3_moe"]()).named_parameters())

    one, same, other = made(1), made(1), made(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    down = one["model.layers.0.mlp.experts.down_proj"]
    assert down.std().item() == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(down[0], down[1])
    assert not one["model.embed_tokens.weight"][0].any()
    assert torch.equal(one["model.norm.weight"], torch.ones(32))


def test_the_dtype_of_a_fresh_model_is_the_configs() -> None:
    config = CONFIGS["llama"]()
    assert NeMoAutoModelForCausalLM.from_config(config).dtype == torch.float32
    config.dtype = torch.bfloat16
    assert NeMoAutoModelForCausalLM.from_config(config).dtype == torch.bfloat16
    assert NeMoAutoModelForCausalLM.from_config(config, torch_dtype=torch.float16).dtype == torch.float16


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, automodel; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_errors_share_one_base() -> None:
    assert issubclass(UsageError, CkptError)


def test_a_native_checkpoint_without_a_config_says_what_is_missing(tmp_path: Path) -> None:
    repository(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "native")
    shutil.rmtree(tmp_path / "native" / "hf")
    with pytest.raises(NotFoundError, match=r"without config\.json") as caught:
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert "native/hf" in str(caught.value.hint)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 does not rename this family's tensors")
def test_a_native_checkpoint_that_transformers_would_have_to_rename_says_what_to_do(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = transformers.PhimoeConfig(**sizes, **heads)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "native")
    with pytest.raises(LayoutError, match="parameters of the model are not in the checkpoint") as caught:
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert "ckpt consolidate" in str(caught.value.hint)


def test_a_url_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(UsageError, match="models load from directories and the Hub"):
        NeMoAutoModelForCausalLM.from_pretrained("s3://bucket/model")
