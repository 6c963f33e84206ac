"""Names decide what a tensor is: adapters are not weights, and tied and untied heads stay what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert, verify
from ckpt_tools.core.dtypes import DTYPES
from ckpt_tools.core.errors import LayoutError
from ckpt_tools.formats import hf
from tests.checkpoints import make_repository, tensor_bytes, write_repository
from tests.quantised import overwrite

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rewritten(root: Path, source: Path, **tensors: tuple[int, ...] | None) -> Path:
    """The source with tensors of other shapes (`__` for dots in their names), or without them."""
    shapes = {name: tensor.shape for name, tensor in hf.open_repository(source).store.tensors.items()}
    shapes |= {name.replace("__", "."): shape for name, shape in tensors.items()}  # type: ignore[dict-item]
    described = {name: (DTYPES["BF16"], shape) for name, shape in shapes.items() if shape is not None}
    return write_repository(root, described, json.loads((source / "config.json").read_bytes()), max_shard_size=10**9)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.mlp.experts.1.down_proj.lora_B.weight",
        "model.layers.0.mlp.experts.1.down_proj.lora_B.default.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
    ],
)
def test_adapters_are_neither_dropped_nor_taken_for_the_weight_that_their_name_contains(
    tmp_path: Path, name: str
) -> None:
    plain = make_repository(tmp_path / "plain")
    source = rewritten(tmp_path / "source", plain, **{name.replace(".", "__"): (4, 32)})
    with pytest.raises(LayoutError, match="1 unexpected") as caught:
        convert(source, tmp_path / "native")
    assert name in str(caught.value)
    base = name.replace("lora_A.weight", "base_layer.weight")
    if base != name:
        renamed = {"model__layers__0__self_attn__q_proj__weight": None, base.replace(".", "__"): (32, 32)}
        with pytest.raises(LayoutError, match=r"1 missing\n  model\.layers\.0\.self_attn\.q_proj\.weight"):
            convert(rewritten(tmp_path / "wrapped", plain, **renamed), tmp_path / "native")


def test_a_tied_head_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    plain = make_repository(tmp_path / "plain", "qwen2", tie_word_embeddings=True)
    with pytest.raises(LayoutError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        convert(rewritten(tmp_path / "source", plain, lm_head__weight=(80, 32)), tmp_path / "native")


def test_an_untied_head_with_the_values_of_the_embeddings_stays_a_tensor_of_its_own(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3", tie_word_embeddings=False)
    overwrite(source, HEAD, tensor_bytes(source)[EMBEDDINGS])
    convert(source, tmp_path / "native", mesh="dp_shard=2")
    consolidate(tmp_path / "native", tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)
    assert json.loads((tmp_path / "back/config.json").read_bytes())["tie_word_embeddings"] is False
    verify(tmp_path / "back", against=source)
