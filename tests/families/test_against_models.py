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
from tests.checkpoints import CONFIGS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VARIANTS = [(family, {}) for family in FAMILIES] + [
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_hidden_layers": 4}),
    ("qwen3_moe", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    ("llama", {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}),
    ("mixtral", {"num_key_value_heads": 1}),
]


def config_object(family: str, changes: dict[str, Any]) -> Any:
    fields = {k: v for k, v in {**CONFIGS[family], **changes}.items() if k not in ("model_type", "torch_dtype")}
    return transformers.AutoConfig.for_model(get_family(family).model_types[0], **fields)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_the_native_model_has_the_layouts_native_names_and_shapes(family: str, changes: dict[str, Any]) -> None:
    from automodel.models import NATIVE_MODELS

    config = config_object(family, changes)
    with torch.device("meta"):
        model = NATIVE_MODELS[config.model_type](config)
    layout = get_family(family).layout(config.to_dict())
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert found == {name: tensor.shape for name, tensor in layout.native.items()}


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_transformers_writes_the_layouts_hugging_face_names_shapes_and_dtypes(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    config = config_object(family, changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    layout = get_family(family).layout(config.to_dict())
    store = hf.open_repository(tmp_path / "hf").store
    assert {name: t.shape for name, t in store.tensors.items()} == {n: t.shape for n, t in layout.leaves.items()}
    assert {t.dtype.name for t in store.tensors.values()} == {"BF16"}
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
