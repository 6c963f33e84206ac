"""generate() gives the tokens that transformers gives, and the KV cache changes nothing."""

from __future__ import annotations

import pytest
import torch

from automodel.compat import TRANSFORMERS_5
from tests.automodel.helpers import CONFIGS, every_config, installed, pair, relative, tokens

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@every_config
def test_greedy_tokens_are_identical(name: str) -> None:
    theirs, ours = pair(name)
    ids = tokens(2, 6)
    assert torch.equal(ours.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    "name",
    installed(
        "qwen3_moe",
        "mixtral sliding window",
        "deepseek_v3",
        "gpt_oss",
        "qwen3_next",
        "qwen2 sliding layers",
        "llama",
        "nemotron_h",
    ),
)
def test_greedy_tokens_are_identical_for_a_left_padded_batch(name: str) -> None:
    theirs, ours = pair(name)
    ids = tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :6] = 0
    ids = ids.masked_fill(mask == 0, 0)
    arguments = {"attention_mask": mask, "pad_token_id": 0, **GREEDY}
    actual = ours.generate(ids, **arguments)
    assert torch.equal(actual, theirs.generate(ids, **arguments))
    alone = ours.generate(ids[2:, 6:], **GREEDY)
    assert torch.equal(actual[2, 8:], alone[0, 2:])


@pytest.mark.parametrize("name", installed("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "llama", "nemotron_h"))
def test_beam_search_and_static_cache_agree(name: str) -> None:
    theirs, ours = pair(name)
    ids = tokens(2, 5)
    for arguments in ({"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}):
        if name == "deepseek_v3" and "num_beams" not in arguments and not TRANSFORMERS_5:
            continue  # the static cache of 4.57 has keys and values of one size only, for its own class too
        actual, expected = (m.generate(ids, pad_token_id=0, **GREEDY, **arguments) for m in (ours, theirs))
        assert torch.equal(actual, expected)


@every_config
def test_decoding_with_a_cache_gives_the_logits_of_one_pass(name: str) -> None:
    _, ours = pair(name)
    ids = tokens(2, 13)
    with torch.no_grad():
        whole = ours(ids, use_cache=False)
        first = ours(ids[:, :6], use_cache=True)
        cache, parts = first.past_key_values, [first.logits]
        for begin, end in ((6, 7), (7, 10), (10, 13)):
            parts.append(ours(ids[:, begin:end], past_key_values=cache).logits)
    assert whole.past_key_values is None
    assert relative(torch.cat(parts, 1), whole.logits) < 1e-5


def test_training_makes_no_cache_unless_asked() -> None:
    _, ours = pair("llama")
    assert ours.train()(tokens(1, 4)).past_key_values is None
    assert ours(tokens(1, 4), use_cache=True).past_key_values is not None


def test_every_family_is_covered() -> None:
    from automodel.models import NATIVE_MODELS

    assert {make().model_type for make in CONFIGS.values()} == set(NATIVE_MODELS)
