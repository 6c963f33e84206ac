"""Each family against the real published names, and against what its config says."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert, inspect
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import LayoutError, UsageError
from ckpt_tools.families import FAMILIES, family_of, get_family, layout_for
from ckpt_tools.layouts.layout import Side
from tests.checkpoints import CONFIGS, make_repository, tensor_bytes, write_repository

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "tests" / "fixtures" / "manifests"
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
    "tie_word_embeddings": False,
}
PREDICT = "model.layers.61."


def test_deepseek_v3_has_exactly_the_published_names_and_shapes() -> None:
    published = json.loads(gzip.decompress((MANIFESTS / "DeepSeek-V3.json.gz").read_bytes()))
    layout = get_family("deepseek_v3").layout(DEEPSEEK_V3, names=published)
    assert {name: list(leaf.shape) for name, leaf in layout.leaves.items()} == published
    whole = layout_for(DEEPSEEK_V3)
    assert whole is not None
    assert {name for name in whole.leaves if name not in published} == {n for n in whole.leaves if PREDICT in n}
    assert whole.leaves[PREDICT + "eh_proj.weight"].shape == (7168, 2 * 7168)


@pytest.mark.parametrize("side", ["hf", "native"])
@pytest.mark.parametrize("form", [None, "", "fp8"])
def test_layers_for_multi_token_prediction_are_there_if_any_name_of_theirs_is(side: Side, form: str | None) -> None:
    family = get_family("deepseek_v3")
    config = {**CONFIGS["deepseek_v3"], "num_nextn_predict_layers": 2}
    whole = family.layout(config, form="fp8" if form is None else form)
    names = whole.shapes(side)
    assert family.layout(config, form=form, names=names).layers == ("dense", "moe", "moe", "predict", "predict")
    # One that is half there is not left out: what is missing of it is an error.
    half = [name for name in names if "layers.3." not in name]
    assert family.layout(config, form=form, names=half).layers == whole.layers
    none = [name for name in half if "layers.4." not in name]
    layout = family.layout(config, form=form, names=none)
    assert layout.layers == ("dense", "moe", "moe")
    assert set(none) == layout.shapes(side).keys()
    assert not any("layers.3." in name or "layers.4." in name for name in (*layout.native, *layout.leaves))


def test_qwen3_30b_a3b_has_exactly_the_published_names_and_shapes() -> None:
    published = json.loads(gzip.decompress((MANIFESTS / "Qwen3-30B-A3B.json.gz").read_bytes()))
    layout = layout_for(QWEN3_30B_A3B)
    assert layout is not None
    assert {name: list(leaf.shape) for name, leaf in layout.leaves.items()} == published


def test_qwen3_30b_a3b_native_experts_are_out_by_in() -> None:
    layout = layout_for(QWEN3_30B_A3B)
    assert layout is not None
    assert layout.native["model.layers.47.mlp.experts.gate_up_proj"].shape == (128, 1536, 2048)
    assert layout.native["model.layers.47.mlp.experts.down_proj"].shape == (128, 2048, 768)
    assert layout.native["model.layers.0.self_attn.qkv_proj.weight"].shape == ((32 + 8) * 128, 2048)
    assert len(layout.native) == 3 + 48 * 9


@pytest.mark.parametrize(
    ("only_dense", "step", "kinds"),
    [([], 1, "mmmm"), ([1], 1, "mdmm"), ([], 2, "dmdm"), ([3], 2, "dmdd")],
)
def test_qwen3_moe_layers_are_dense_where_the_config_says(only_dense: list[int], step: int, kinds: str) -> None:
    config = {
        **CONFIGS["qwen3_moe"],
        "num_hidden_layers": 4,
        "mlp_only_layers": only_dense,
        "decoder_sparse_step": step,
    }
    layout = layout_for(config)
    assert layout is not None
    for index, kind in enumerate(kinds):
        assert (f"model.layers.{index}.mlp.experts.gate_up_proj" in layout.native) == (kind == "m")
        assert (f"model.layers.{index}.mlp.gate_up_proj.weight" in layout.native) == (kind == "d")


@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_of_a_family_hold_the_same_number_of_elements(family: str) -> None:
    layout = layout_for(CONFIGS[family])
    assert layout is not None
    native = sum(piece.numel for tensor in layout.native.values() for piece in tensor.view.pieces)
    assert native == sum(leaf.numel for leaf in layout.leaves.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_from_a_mesh_bit_for_bit(tmp_path: Path, family: str) -> None:
    source = make_repository(tmp_path / "source", family)
    convert(source, tmp_path / "native", mesh="dp_shard=2,ep=3")
    consolidate(tmp_path / "native", tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)
    assert inspect(tmp_path / "native").family == family
    assert inspect(tmp_path / "native").side == "native"


def test_the_document_of_the_families_is_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "family_docs.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "python scripts/family_docs.py"


def test_tied_embeddings_are_on_disk_once() -> None:
    layout = layout_for({**CONFIGS["qwen2"], "tie_word_embeddings": True})
    assert layout is not None
    assert "lm_head.weight" not in layout.leaves
    assert layout.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        get_family("qwen3-moe")
    assert "qwen3_moe" in (caught.value.hint or "")


def test_an_architecture_without_a_native_form_has_no_family() -> None:
    assert family_of({"model_type": "gpt2"}) is None


def test_a_config_without_a_needed_field_says_which() -> None:
    config = {k: v for k, v in CONFIGS["mixtral"].items() if k != "num_local_experts"}
    with pytest.raises(LayoutError, match="num_local_experts"):
        layout_for(config)


def test_minimax_m2_in_fp8_has_as_many_scales_as_the_published_repository() -> None:
    config = {
        "model_type": "minimax_m2",
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 256,
        "vocab_size": 200064,
    }
    shapes = get_family("minimax_m2").layout(config, form="fp8").shapes("hf")
    assert sum(name.endswith("weight_scale_inv") for name in shapes) == 47_864
    assert shapes["model.layers.61.self_attn.q_norm.weight"] == (6144,)
    assert shapes["model.layers.0.block_sparse_moe.experts.255.w2.weight_scale_inv"] == (24, 12)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, "dmd"),
        ({"interleave_moe_layer_step": 1}, "mmm"),
        ({"moe_layers": [0, 2]}, "mdm"),
        ({"moe_layers": []}, "ddd"),
    ],
)
def test_llama4_layers_have_experts_where_the_config_says(changes: dict[str, object], kinds: str) -> None:
    layout = layout_for({**CONFIGS["llama4_text"], **changes})
    assert layout is not None
    assert "".join(kind[0] for kind in layout.layers) == kinds
    for index, kind in enumerate(kinds):
        assert (f"model.layers.{index}.feed_forward.experts.down_proj" in layout.leaves) == (kind == "m")


@pytest.mark.parametrize("family", [name for name in FAMILIES if get_family(name).data_only])
def test_a_layout_takes_the_side_of_the_names_that_a_model_has(family: str) -> None:
    layout = layout_for(CONFIGS[family])
    assert layout is not None
    assert layout.of_names(layout.native.keys()) is layout
    of_files = layout.of_names(layout.leaves.keys())
    assert of_files.shapes("native") == of_files.shapes("hf") == layout.shapes("hf")
    assert (of_files is layout) == (layout.shapes("native") == layout.shapes("hf"))
    # One name that is lost or new does not change sides.
    assert layout.of_names([*layout.native, "more"][1:]) is layout


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        (
            "gemma3",
            ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "multi_modal_projector.mm_soft_emb_norm"),
        ),
        ("llama4", ("vision_model.model.layers.0.mlp.fc1.weight", "multi_modal_projector.linear_1.weight")),
    ],
)
def test_a_multimodal_repository_loses_nothing(tmp_path: Path, model_type: str, names: tuple[str, ...]) -> None:
    text = layout_for(CONFIGS[f"{model_type}_text"])
    assert text is not None
    tensors = {f"language_model.{name}": (DTYPES["BF16"], leaf.shape) for name, leaf in text.leaves.items()}
    tensors |= dict.fromkeys(names, (DTYPES["BF16"], (6, 4)))
    config = {"model_type": model_type, "text_config": CONFIGS[f"{model_type}_text"], "vision_config": {}}
    source = write_repository(tmp_path / "source", tensors, config)
    assert inspect(source).family == "identity"
    convert(source, tmp_path / "native", mesh="dp_shard=2")
    consolidate(tmp_path / "native", tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)


def test_a_text_config_over_multimodal_files_names_what_does_not_fit(tmp_path: Path) -> None:
    tensors = {"language_model.model.norm.weight": (DTYPES["BF16"], (32,))}
    source = write_repository(tmp_path / "source", tensors, CONFIGS["gemma3_text"])
    with pytest.raises(LayoutError, match=r"1 unexpected\n.*language_model\.model\.norm\.weight"):
        inspect(source)


@pytest.mark.parametrize(("manifest", "form"), [("gpt-oss-20b", ""), ("gpt-oss-20b-mxfp4", "mxfp4")])
def test_gpt_oss_20b_has_exactly_the_published_names_and_shapes_in_both_forms(manifest: str, form: str) -> None:
    config = {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "vocab_size": 201088,
    }
    published = json.loads(gzip.decompress((MANIFESTS / f"{manifest}.json.gz").read_bytes()))
    layout = get_family("gpt_oss").layout(config, form=form)
    assert {name: list(shape) for name, shape in layout.shapes("hf").items()} == published
