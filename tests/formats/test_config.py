"""One config.json for both transformers majors: the installed one must read from it what the source's own says."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import transformers

from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import UsageError
from ckpt_tools.formats.config import config_dtype, portable_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
OLD = {
    "model_type": "qwen3_moe",
    "rope_theta": 5e5,
    "rope_scaling": YARN,
    "partial_rotary_factor": 0.5,
    "torch_dtype": "bfloat16",
    "num_experts": 8,
    "custom": {"kept": [1, None]},
}
NEW = {
    "model_type": "qwen3_moe",
    "rope_parameters": {**YARN, "rope_theta": 5e5, "partial_rotary_factor": 0.5},
    "dtype": "bfloat16",
    "num_local_experts": 8,
    "custom": {"kept": [1, None]},
}


def test_both_spellings_give_the_same_portable_config() -> None:
    old, new = portable_config(OLD), portable_config(NEW)
    assert old == new == {**OLD, **NEW, "architectures": ["Qwen3MoeForCausalLM"]}
    assert portable_config(old) == old


@pytest.mark.parametrize("config", [OLD, NEW, {"model_type": "x"}, {"rope_scaling": None, "auto_map": {"A": "b.C"}}])
def test_nothing_is_dropped_changed_or_shared_with_the_source(config: dict[str, object]) -> None:
    before = copy.deepcopy(config)
    result = portable_config(config)
    assert {key: result[key] for key in config} == before
    for value in result.values():
        if isinstance(value, dict):
            value["changed"] = True
    assert config == before


def test_nemotron_names_its_layers_in_every_way_that_readers_take() -> None:
    published = {"model_type": "nemotron_h", "hybrid_override_pattern": "M*E-", "n_groups": 8, "auto_map": {"A": "b.C"}}
    assert portable_config(published) == {
        **published,
        "architectures": ["NemotronHForCausalLM"],
        "num_hidden_layers": 4,
        "mamba_n_groups": 8,
    }
    newest = {
        "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
        "mtp_layers_block_type": ["full_attention", "moe"],
        "mamba_n_groups": 8,
    }
    completed = portable_config(newest)
    assert portable_config(completed) == completed
    assert completed["hybrid_override_pattern"] == "M*E-"
    assert completed["mtp_hybrid_override_pattern"] == "*E"
    assert completed["n_groups"] == 8
    # SGLang 0.5.23 refuses the newest names, and transformers 5 takes the older ones for them.
    assert completed["layers_block_type"] == ["mamba", "attention", "moe", "mlp"]
    config_class = getattr(transformers, "NemotronHConfig", None)
    if config_class is not None:
        fields = {key: value for key, value in completed.items() if key != "model_type"}
        assert config_class(**fields).layers_block_type == newest["layers_block_type"]


def test_default_rope_is_spelled_out_for_both() -> None:
    plain = {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert portable_config({"rope_theta": 1e4, "rope_scaling": None}) == plain
    assert portable_config({"rope_parameters": plain["rope_parameters"]}) == plain


def test_the_old_name_of_the_rope_type_is_understood() -> None:
    result = portable_config({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert result["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert result["rope_scaling"] == {"type": "linear", "factor": 2.0}


def test_rope_by_layer_type_goes_both_ways() -> None:
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    assert portable_config(old) == portable_config(new) == {**old, **new}


def test_the_text_part_of_a_composite_config_is_completed_too() -> None:
    config = {"model_type": "composite", "dtype": "float32", "text_config": dict(OLD)}
    result = portable_config(config, dtype=DTYPES["F16"])
    assert result["dtype"] == result["torch_dtype"] == "float16"
    text = result["text_config"]
    assert isinstance(text, dict)
    assert text["dtype"] == text["torch_dtype"] == "float16"
    assert text["rope_parameters"] == NEW["rope_parameters"]
    assert "architectures" not in text


def test_dtype_replaces_both_fields_and_is_read_from_either() -> None:
    assert portable_config(OLD, dtype=DTYPES["F32"])["dtype"] == "float32"
    assert portable_config(OLD, dtype=DTYPES["F32"])["torch_dtype"] == "float32"
    assert portable_config({}, dtype=DTYPES["BF16"]) == {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert config_dtype(OLD) is config_dtype(NEW) is DTYPES["BF16"]
    assert config_dtype({"text_config": {"torch_dtype": "torch.float16"}}) is DTYPES["F16"]
    assert config_dtype({}) is None
    with pytest.raises(UsageError, match="F6_E2M3"):
        portable_config({}, dtype=DTYPES["F6_E2M3"])


def test_architectures_are_kept_or_set_but_never_guessed() -> None:
    assert portable_config({"model_type": "llama"})["architectures"] == ["LlamaForCausalLM"]
    kept = portable_config({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]})
    assert kept["architectures"] == ["LlamaForSequenceClassification"]
    assert "architectures" not in portable_config({"model_type": "unheard_of"})


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2"])
def test_deepseek_v3_says_what_engines_read_without_a_default(model_type: str) -> None:
    result = portable_config({"model_type": model_type})
    assert result["topk_method"] == "noaux_tc"
    assert result["scoring_func"] == "sigmoid"
    assert result["moe_layer_freq"] == 1
    given = {"model_type": model_type, "topk_method": "greedy", "moe_layer_freq": 2}
    assert {**portable_config(given), **given} == portable_config(given)
    assert "topk_method" not in portable_config({"model_type": "qwen3_moe"})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Qwen3MoeConfig", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
        ("Qwen2MoeConfig", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
        ("MixtralConfig", {"num_local_experts": 6}),
        ("DeepseekV3Config", {"n_routed_experts": 16, "n_group": 2, "topk_group": 1, "num_attention_heads": 4}),
        ("Qwen3Config", {}),
        ("Qwen2Config", {"tie_word_embeddings": True}),
        ("LlamaConfig", {}),
    ],
)
def test_the_installed_transformers_reads_what_it_wrote(tmp_path: Path, name: str, settings: dict[str, object]) -> None:
    source = getattr(transformers, name)(hidden_size=32, num_hidden_layers=2, vocab_size=64, **settings)
    written = json.loads(source.to_json_string())
    if "rope_parameters" in written:
        written["rope_parameters"]["rope_theta"] = 77777.0
    else:
        written["rope_theta"] = 77777.0
    (tmp_path / "config.json").write_text(json.dumps(written))
    expected = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(portable_config(written, dtype=DTYPES["BF16"])))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    found = loaded.to_dict()
    rope = found.get("rope_parameters") or found
    assert rope["rope_theta"] == 77777.0
    renamed = {"dtype", "torch_dtype", "rope_theta", "rope_parameters", "rope_scaling", "architectures", "num_experts"}
    renamed |= {"num_local_experts"}
    assert {k: v for k, v in expected.items() if k not in renamed} == {
        k: found[k] for k in expected if k not in renamed
    }
    experts = settings.get("num_experts") or settings.get("num_local_experts")
    if experts:
        assert experts in (getattr(loaded, "num_experts", None), getattr(loaded, "num_local_experts", None))
    assert str(loaded.dtype).endswith("bfloat16")


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text", "qwen3_5_text"])
def test_layers_with_linear_attention_are_named_one_by_one_and_by_their_interval(model_type: str) -> None:
    types = [*["linear_attention"] * 2, "full_attention"] * 2
    given = {"model_type": model_type, "num_hidden_layers": 6}
    by_interval, by_list = ({**given, **x} for x in ({"full_attention_interval": 3}, {"layer_types": types}))
    both = {"full_attention_interval": 3, "layer_types": types}
    assert portable_config(by_interval).items() >= both.items()
    assert portable_config(by_list).items() >= both.items()
    assert portable_config(given)["full_attention_interval"] == 4
    irregular = [*types[:-1], "linear_attention"]
    assert "full_attention_interval" not in portable_config({**given, "layer_types": irregular})


@pytest.mark.parametrize(
    "spelling",
    [
        {"rotary_dim": 8, "rope_theta": 5e6},
        {"rope_parameters": {"rope_theta": 5e6, "rope_type": "default", "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5, "rope_theta": 5e6},
    ],
)
def test_minimax_m2_says_what_the_engines_read_without_a_default(spelling: dict[str, object]) -> None:
    result = portable_config({"model_type": "minimax_m2", "head_dim": 16, **spelling})
    assert result["rotary_dim"] == 8
    assert result["partial_rotary_factor"] == 0.5
    assert result["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    assert result["scoring_func"] == "sigmoid"
    # Without it vLLM and SGLang drop the correction bias in silence.
    assert result["use_routing_bias"] is True


def test_minimax_m2_without_partial_rope_rotates_every_dimension() -> None:
    config = {"model_type": "minimax_m2", "head_dim": 16, "rope_parameters": {"rope_theta": 5e6}}
    assert portable_config(config)["rotary_dim"] == 16
    assert "partial_rotary_factor" not in portable_config(config)
