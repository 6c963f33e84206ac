"""Each family against the real published names, and against what its config says."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sparse import DEEPSEEK_V3, QWEN3_30B_A3B
from ckpt_tools import consolidate, convert, inspect
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import LayoutError, UsageError
from ckpt_tools.families import FAMILIES, family_of, get_family, layout_for
from ckpt_tools.layouts.layout import Side
from tests.checkpoints import CONFIGS, make_repository, tensor_bytes, write_repository

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "tests" / "fixtures" / "manifests"
PREDICT = "model.layers.61."
NEMOTRON_3_NANO = {
    "model_type": "nemotron_h",
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 1856,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "n_routed_experts": 128,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "vocab_size": 131072,
}


def test_nemotron_3_nano_has_exactly_the_published_names_and_shapes() -> None:
    published = json.loads(gzip.decompress((MANIFESTS / "NVIDIA-Nemotron-3-Nano-30B-A3B.json.gz").read_bytes()))
    layout = layout_for(NEMOTRON_3_NANO)
    assert layout is not None
    assert len(published) == 6243
    assert {name: list(leaf.shape) for name, leaf in layout.leaves.items()} == published
    assert layout.native["model.layers.1.mixer.experts.up_proj"].shape == (128, 1856, 2688)
    assert layout.native["model.layers.1.mixer.experts.down_proj"].shape == (128, 2688, 1856)
    assert layout.native["model.layers.5.mixer.qkv_proj.weight"].shape == ((32 + 2 * 2) * 128, 2688)
    state = {name.partition("mixer.")[2] for name, leaf in layout.leaves.items() if leaf.keep_dtype}
    assert state == {"A_log", "D", "dt_bias", "gate.weight", "gate.e_score_correction_bias"}


def test_nemotron_h_reads_its_layers_from_a_pattern_or_a_list_in_either_spelling() -> None:
    config = {key: value for key, value in CONFIGS["nemotron_h"].items() if "pattern" not in key}
    by_pattern = layout_for(CONFIGS["nemotron_h"])
    older = {"layers_block_type": ["mamba", "attention", "moe", "mlp"]}
    newer = {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
        "mtp_layers_block_type": ["full_attention", "moe"],
    }
    assert by_pattern is not None
    assert by_pattern.layers == (
        *(f"decoder+{kind}" for kind in older["layers_block_type"]),
        "predict+predict_attention+predict_first",
        "predict+predict_moe+predict_last",
    )
    for spelling in (older, newer):
        layout = layout_for({**config, **spelling})
        assert layout is not None
        assert (layout.layers, layout.leaves) == (by_pattern.layers, by_pattern.leaves)
    with pytest.raises(LayoutError, match="hybrid_override_pattern has layers of no known kind: X"):
        layout_for({**CONFIGS["nemotron_h"], "hybrid_override_pattern": "MX"})
    with pytest.raises(LayoutError, match="layers_block_type or hybrid_override_pattern"):
        layout_for(config)


def test_nemotron_h_layers_for_multi_token_prediction_have_the_names_of_nemotron_3_super() -> None:
    layout = layout_for(CONFIGS["nemotron_h"])
    assert layout is not None
    ends = {"enorm", "hnorm", "eh_proj", "final_layernorm"}
    found = {name.removesuffix(".weight") for name in layout.leaves if name.startswith("mtp.")}
    assert {name for name in found if name.rpartition(".")[2] in ends} == {
        "mtp.layers.0.enorm",
        "mtp.layers.0.hnorm",
        "mtp.layers.0.eh_proj",
        "mtp.layers.1.final_layernorm",
    }
    assert {"mtp.layers.0.norm", "mtp.layers.0.mixer.q_proj", "mtp.layers.1.mixer.experts.3.up_proj"} <= found
    assert layout.leaves["mtp.layers.0.eh_proj.weight"].shape == (32, 64)
    names = [name for name in layout.leaves if not name.startswith("mtp.")]
    assert get_family("nemotron_h").layout(CONFIGS["nemotron_h"], names=names).leaves.keys() == set(names)


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


LAYERS, EXPERTS = 8, 16
"""Of 48 and 512: what is published repeats."""
QWEN3_NEXT_80B_A3B = {
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "full_attention_interval": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "num_experts": EXPERTS,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# The files of Qwen3-Next-80B-A3B-Instruct-FP8, one line for the tensors of a kind; `*` has a `weight_scale_inv`, F32.
QWEN3_NEXT_FP8 = {
    "lm_head.weight": (151936, 2048),
    "model.embed_tokens.weight": (151936, 2048),
    "model.norm.weight": (2048,),
    "mtp.fc.weight": (2048, 4096),
    "mtp.norm.weight": (2048,),
    "mtp.pre_fc_norm_embedding.weight": (2048,),
    "mtp.pre_fc_norm_hidden.weight": (2048,),
}
QWEN3_NEXT_FP8_LAYER = {
    "input_layernorm.weight": (2048,),
    "mlp.experts.{expert}.down_proj.weight*": (2048, 512),
    "mlp.experts.{expert}.gate_proj.weight*": (512, 2048),
    "mlp.experts.{expert}.up_proj.weight*": (512, 2048),
    "mlp.gate.weight": (EXPERTS, 2048),
    "mlp.shared_expert.down_proj.weight*": (2048, 512),
    "mlp.shared_expert.gate_proj.weight*": (512, 2048),
    "mlp.shared_expert.up_proj.weight*": (512, 2048),
    "mlp.shared_expert_gate.weight": (1, 2048),
    "post_attention_layernorm.weight": (2048,),
}
QWEN3_NEXT_FP8_LINEAR = {
    "linear_attn.A_log": (32,),
    "linear_attn.conv1d.weight": (8192, 1, 4),
    "linear_attn.dt_bias": (32,),
    "linear_attn.in_proj_ba.weight": (64, 2048),
    "linear_attn.in_proj_qkvz.weight*": (12288, 2048),
    "linear_attn.norm.weight": (128,),
    "linear_attn.out_proj.weight*": (2048, 4096),
}
QWEN3_NEXT_FP8_FULL = {
    "self_attn.k_norm.weight": (256,),
    "self_attn.k_proj.weight*": (512, 2048),
    "self_attn.o_proj.weight*": (2048, 4096),
    "self_attn.q_norm.weight": (256,),
    "self_attn.q_proj.weight*": (8192, 2048),
    "self_attn.v_proj.weight*": (512, 2048),
}


def qwen3_next_fp8() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published repository, with fewer layers and experts."""
    listed = dict(QWEN3_NEXT_FP8)
    blocks = [(f"model.layers.{i}.", i % 4 == 3) for i in range(LAYERS)] + [("mtp.layers.0.", True)]
    for prefix, full in blocks:
        for name, shape in {**QWEN3_NEXT_FP8_LAYER, **(QWEN3_NEXT_FP8_FULL if full else QWEN3_NEXT_FP8_LINEAR)}.items():
            for expert in range(EXPERTS) if "{expert}" in name else (None,):
                listed[prefix + name.format(expert=expert)] = shape
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in listed.items():
        found[name.removesuffix("*")] = shape
        if name.endswith("*"):
            found[name.removesuffix("*") + "_scale_inv"] = tuple(-(-n // 128) for n in shape)
    return found


def test_qwen3_next_has_exactly_the_published_names_and_shapes_plain_and_in_fp8() -> None:
    published = qwen3_next_fp8()
    family = get_family("qwen3_next")
    assert family.layout(QWEN3_NEXT_80B_A3B, form="fp8").shapes("hf") == published
    read = family.layout(QWEN3_NEXT_80B_A3B, names=published)
    assert (read.form, read.shapes("hf")) == ("fp8", published)
    plain = {name: shape for name, shape in published.items() if not name.endswith("_scale_inv")}
    assert family.layout(QWEN3_NEXT_80B_A3B, names=plain).shapes("hf") == plain
    assert len(family.layout(QWEN3_NEXT_80B_A3B, names=plain).native) == 3 + 6 * 15 + 2 * 12 + 4 + 12


def test_qwen3_next_in_fp8_names_the_modules_that_are_plain_as_the_published_config_does() -> None:
    family = get_family("qwen3_next")
    layout = family.layout(QWEN3_NEXT_80B_A3B, form="fp8")
    described = family.quantization_config(QWEN3_NEXT_80B_A3B, layout)
    assert described is not None
    plain = set(described["modules_to_not_convert"])
    linear = ("conv1d", "in_proj_ba", "norm")
    mlp = ("input_layernorm", "mlp.gate", "mlp.shared_expert_gate", "post_attention_layernorm")
    norms = ("self_attn.k_norm", "self_attn.q_norm")
    published = {"lm_head", "mtp.fc", "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"}
    published |= {f"model.layers.{i}.linear_attn.{name}" for i in range(LAYERS) if i % 4 != 3 for name in linear}
    published |= {f"model.layers.{i}.{name}" for i in range(LAYERS) for name in mlp}
    published |= {f"model.layers.{i}.{name}" for i in range(3, LAYERS, 4) for name in norms}
    published |= {f"mtp.layers.0.{name}" for name in (*mlp, *norms)}
    # Ours also has the embedding and the last norm, which no reader would quantise.
    assert plain == published | {"model.embed_tokens", "model.norm"}


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe", "qwen3_5"])
@pytest.mark.parametrize("form", ["", "fp8"])
def test_the_block_for_multi_token_prediction_is_there_if_any_name_of_it_is(family: str, form: str) -> None:
    config = CONFIGS[family]
    whole = get_family(family).layout(config, form=form)
    for side in ("hf", "native"):
        names = whole.shapes(side)
        assert any(name.startswith("mtp.layers.0.") for name in names)
        without = [name for name in names if not name.startswith("mtp.")]
        assert get_family(family).layout(config, form=form, names=names).shapes(side) == names
        assert get_family(family).layout(config, form=form, names=[*without, "mtp.fc.weight"]).shapes(side) == names
        assert get_family(family).layout(config, form=form, names=without).shapes(side).keys() == set(without)


def test_gated_attention_keeps_whole_groups_of_kv_heads_together() -> None:
    config = {**CONFIGS["qwen3_next"], "hidden_size": 1, "head_dim": 2}
    layout = layout_for(config)
    assert layout is not None
    rows = {}
    for piece in layout.native["model.layers.1.self_attn.qkv_proj.weight"].view.pieces:
        for steps in itertools.product(*(range(loop.size) for loop in piece.loops)):
            at, leaf = list(piece.starts), piece.leaf_start
            for loop, step in zip(piece.loops, steps, strict=True):
                at[loop.dim] += step * loop.step
                leaf += step * loop.leaf_stride
            rows[at[0]] = (piece.leaf.split(".")[-2][0], leaf)
    # Four query heads of [query, gate], two KV heads, head_dim 2.
    groups = [
        [("q", 0), ("q", 1), ("q", 4), ("q", 5), ("q", 2), ("q", 3), ("q", 6), ("q", 7)],
        [("k", 0), ("k", 1), ("v", 0), ("v", 1)],
        [("q", 8), ("q", 9), ("q", 12), ("q", 13), ("q", 10), ("q", 11), ("q", 14), ("q", 15)],
        [("k", 2), ("k", 3), ("v", 2), ("v", 3)],
    ]
    assert [rows[i] for i in range(24)] == [row for group in groups for row in group]


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


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3_next", {"num_hidden_layers": 2}, "layer_types names 3 layers, num_hidden_layers is 2"),
        ("qwen3_next", {"linear_num_key_heads": 0}, "value heads do not divide over 0 key heads"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "value heads do not divide over 3 key heads"),
        ("llama", {"num_attention_heads": 0}, "0 attention heads do not divide"),
    ],
)
def test_a_config_that_contradicts_itself_is_an_error_in_words(
    family: str, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(LayoutError, match=words):
        layout_for({**CONFIGS[family], **changes})
