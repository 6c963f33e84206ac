"""Rotary tables of every rope type, and that moving a model cannot spoil them."""

from __future__ import annotations

import pytest
import torch
import transformers

from automodel.models import NeMoLlamaForCausalLM
from automodel.models.rope import RotaryEmbedding
from tests.automodel.helpers import LLAMA3_ROPE, SIZES, pair, relative, rope, tokens

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, not truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "llama3": LLAMA3_ROPE,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SCALINGS)
def test_tables_equal_those_of_transformers_as_lengths_grow_and_shrink(kind: str, dtype: torch.dtype) -> None:
    config = transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 64}, **rope(5e4, SCALINGS[kind]))
    theirs = transformers.LlamaForCausalLM(config).model.rotary_emb
    ours = RotaryEmbedding(config)
    # Tables in FP32 beside values in BF16 would drift away from what was trained and what engines serve.
    x = torch.zeros(1, dtype=dtype)
    for length in (10, 32, 40, 64, 100, 70, 150, 64, 20, 33):
        positions = torch.arange(length)[None]
        for actual, expected in zip(ours(x, positions), theirs(x, positions), strict=True):
            assert actual.dtype == expected.dtype == dtype
            assert torch.equal(actual, expected), f"length {length}"


@pytest.mark.parametrize("name", ["qwen3_moe", "llama biases, llama3 rope"])
def test_a_trip_through_bfloat16_leaves_the_frequencies_exact(name: str) -> None:
    _, ours = pair(name)
    before = ours.model.rotary_emb.inv_freq.clone()
    ours.to(torch.bfloat16)
    assert ours.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(ours.to(torch.float32).model.rotary_emb.inv_freq, before)


def test_meta_construction_gives_the_same_frequencies_once_materialised() -> None:
    theirs, ours = pair("llama biases, llama3 rope")
    with torch.device("meta"):
        late = NeMoLlamaForCausalLM(ours.config)
    late.to_empty(device="cpu")
    late.load_state_dict(ours.state_dict(), strict=True)
    late.tie_weights()
    ids = tokens(1, 9)
    with torch.no_grad():
        assert relative(late.eval()(ids).logits, theirs(ids).logits) < 1e-5


def test_frequencies_are_not_saved() -> None:
    assert not [name for name in pair("llama")[1].state_dict() if "inv_freq" in name]


def test_an_unknown_rope_type_is_named() -> None:
    config = transformers.LlamaConfig(**SIZES)
    for field in ("rope_parameters", "rope_scaling"):
        if hasattr(config, field):
            setattr(config, field, {"rope_type": "spiral", "rope_theta": 1e4})
    with pytest.raises(ValueError, match="spiral"):
        RotaryEmbedding(config)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_both_spellings_of_the_config_mean_the_same(kind: str) -> None:
    scaling = {"rope_type": kind, **(SCALINGS[kind] or {})}
    old = transformers.LlamaConfig(**SIZES, rope_theta=5e4, rope_scaling=dict(scaling))
    new = transformers.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 5e4, **scaling})
    x, positions = torch.zeros(1), torch.arange(50)[None]
    tables = [RotaryEmbedding(config)(x, positions) for config in (old, new)]
    assert torch.equal(tables[0][0], tables[1][0])
    assert torch.equal(tables[0][1], tables[1][1])
