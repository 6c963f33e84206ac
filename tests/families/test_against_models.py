"""Each layout against the models themselves: the native one on the meta device, and what transformers writes to disk.

Runs under transformers 4 and 5 alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt_tools import convert, inspect
from ckpt_tools.families import FAMILIES, get_family
from ckpt_tools.formats import hf
from ckpt_tools.layouts.layout import Side
from tests.checkpoints import CONFIGS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
NATIVE_MODELS = pytest.importorskip("automodel.models").NATIVE_MODELS

VARIANTS = [(family, {}) for family in FAMILIES] + [
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_hidden_layers": 4}),
    ("qwen3_moe", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    ("llama", {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}),
    ("mixtral", {"num_key_value_heads": 1}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True}),
    ("deepseek_v3", {"n_shared_experts": 2, "first_k_dense_replace": 2, "num_nextn_predict_layers": 0}),
    ("gpt_oss", {"attention_bias": False, "intermediate_size": 32, "num_key_value_heads": 1}),
    ("nemotron_h", {"hybrid_override_pattern": "M-*", "use_bias": True, "mlp_bias": True, "use_conv_bias": False}),
    ("nemotron_h", {"hybrid_override_pattern": "MEE*", "moe_latent_size": None, "num_key_value_heads": 4}),
    ("nemotron_h", {"mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen3_next", {"attention_bias": True, "tie_word_embeddings": True, "linear_num_key_heads": 4}),
    ("qwen3_next", {"layer_types": None, "full_attention_interval": 3, "mlp_only_layers": [], "num_hidden_layers": 4}),
    ("qwen3_5_moe", {"tie_word_embeddings": True, "linear_num_value_heads": 2}),
    ("glm4_moe", {"attention_bias": False, "use_qk_norm": False, "first_k_dense_replace": 0, "n_shared_experts": 1}),
    ("glm4_moe", {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0, "tie_word_embeddings": True}),
    ("minimax_m2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("olmoe", {"attention_bias": False, "tie_word_embeddings": True}),
    ("llama4_text", {"attention_bias": True, "interleave_moe_layer_step": 1, "tie_word_embeddings": True}),
    ("llama4_text", {"moe_layers": [0, 2]}),
    ("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False}),
]
INSTALLED = [v for v in VARIANTS if get_family(v[0]).model_types[0] in transformers.CONFIG_MAPPING]
NATIVE_VARIANTS = [v for v in INSTALLED if set(get_family(v[0]).model_types) & NATIVE_MODELS.keys()]
DATA_VARIANTS = [v for v in INSTALLED if get_family(v[0]).data_only]


def config_object(family: str, changes: dict[str, Any]) -> Any:
    if get_family(family).model_types[0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    fields = {k: v for k, v in {**CONFIGS[family], **changes}.items() if k not in ("model_type", "torch_dtype")}
    return transformers.AutoConfig.for_model(get_family(family).model_types[0], **fields)


@pytest.mark.parametrize(("family", "changes"), NATIVE_VARIANTS)
def test_the_native_model_has_the_layouts_native_names_and_shapes(family: str, changes: dict[str, Any]) -> None:
    from automodel.parallel.local import tensors_by_name

    config = config_object(family, changes)
    with torch.device("meta"):
        model = NATIVE_MODELS[config.model_type](config)
    found = {name: tuple(tensor.shape) for name, tensor in tensors_by_name(model).items()}
    layout = get_family(family).layout(config.to_dict(), names=found)
    assert found == {name: tensor.shape for name, tensor in layout.native.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_data_only_exactly_where_it_has_no_native_model(family: str) -> None:
    if get_family(family).model_types[0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    assert get_family(family).data_only == (not set(get_family(family).model_types) & NATIVE_MODELS.keys())


@pytest.mark.parametrize(("family", "changes"), DATA_VARIANTS)
def test_transformers_holds_one_side_of_a_data_only_layout(family: str, changes: dict[str, Any]) -> None:
    from automodel.parallel.local import tensors_by_name

    config = config_object(family, changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = {name: tuple(tensor.shape) for name, tensor in tensors_by_name(model).items()}
    layout = get_family(family).layout(config.to_dict(), names=found)
    side: Side = "native" if int(transformers.__version__.split(".")[0]) >= 5 else "hf"
    assert found == layout.shapes(side)
    assert found == layout.of_names(found).shapes("native")


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "qwen3_5_moe", "qwen3_5"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_native_model_holds_the_layers_for_multi_token_prediction_of_the_layout(family: str, count: int) -> None:
    from automodel.parallel.local import tensors_by_name

    model_type = get_family(family).model_types[0]
    if model_type not in NATIVE_MODELS:
        pytest.skip(f"this transformers has no {model_type}")
    config = config_object(family, {"num_nextn_predict_layers": count})
    with torch.device("meta"):
        model = NATIVE_MODELS[model_type](config, predict_layers=count)
    found = {name: tuple(tensor.shape) for name, tensor in tensors_by_name(model).items()}
    layout = get_family(family).layout(config.to_dict())
    assert found == {name: tensor.shape for name, tensor in layout.native.items()}
    assert layout.layers.count("predict") == count


@pytest.mark.parametrize(("family", "changes"), INSTALLED)
def test_transformers_writes_the_layouts_hugging_face_names_shapes_and_dtypes(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    config = config_object(family, changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    store = hf.open_repository(tmp_path / "hf").store
    layout = get_family(family).layout(config.to_dict(), names=store.tensors)
    assert {name: t.shape for name, t in store.tensors.items()} == {n: t.shape for n, t in layout.leaves.items()}
    assert {t.dtype.name for name, t in store.tensors.items() if not layout.leaves[name].keep_dtype} == {"BF16"}
    convert(tmp_path / "hf", tmp_path / "native")
    assert inspect(tmp_path / "native").family == family


def test_an_fp32_tensor_keeps_its_dtype_beside_bf16_ones(tmp_path: Path) -> None:
    config = config_object("qwen3", {})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "native")
    from ckpt_tools.engine.checkpoint import open_checkpoint

    dtypes = open_checkpoint(tmp_path / "native").leaf_dtypes()
    assert dtypes["model.norm.weight"].name == "F32"
    assert dtypes["lm_head.weight"].name == "BF16"
