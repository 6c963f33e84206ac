"""Padding, packing and sliding windows: which tokens see which."""

from __future__ import annotations

import pytest
import torch

from tests.automodel.helpers import every_config, installed, pair, relative, tokens


@every_config
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padding_agrees_with_transformers_and_changes_nothing_for_real_tokens(name: str, attention: str) -> None:
    theirs, ours = pair(name, attention=attention)
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        actual = ours(ids, attention_mask=mask, position_ids=positions).logits
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        alone = ours(ids[1:, 5:]).logits
    assert relative(actual[mask.bool()], expected[mask.bool()]) < 1e-5
    assert relative(actual[1:, 5:], alone) < 1e-5


@every_config
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_see_only_themselves(name: str, attention: str) -> None:
    theirs, ours = pair(name, attention=attention)
    ids = tokens(2, 15)
    lengths = ((4, 8, 3), (9, 5, 1))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        packed = ours(ids, position_ids=positions).logits
        expected = theirs(ids, position_ids=positions, use_cache=False).logits
        alone = [
            torch.cat([theirs(part[None]).logits[0] for part in row.split(n)])
            for row, n in zip(ids, lengths, strict=True)
        ]
    assert relative(packed, torch.stack(alone)) < 1e-5
    # transformers' own see all of the row in GPT-OSS, and wherever a layer scans.
    if not theirs.config.model_type.startswith(("gpt_oss", "nemotron_h", "qwen3_next", "qwen3_5")):
        assert relative(packed, expected) < 1e-5


@pytest.mark.parametrize("name", installed("qwen3_moe", "nemotron_h", "qwen3_next"))
def test_packed_documents_have_the_gradients_of_separate_ones(name: str) -> None:
    # In FP64: some gradients are sums that almost cancel.
    ours = pair(name)[1].double()
    ids = tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    ours(ids, position_ids=positions).logits.square().sum().backward()
    packed = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    for part in ids.split((5, 7), dim=1):
        ours(part).logits.square().sum().backward()
    assert all(relative(packed[name], p.grad) < 1e-4 for name, p in ours.named_parameters())


@pytest.mark.parametrize("name", ["qwen3_moe sliding window", "mixtral sliding window"])
def test_a_token_outside_the_window_of_every_layer_has_no_influence(name: str) -> None:
    _, ours = pair(name)
    ids = tokens(1, 20)
    changed = ids.clone()
    changed[0, 0] = ids[0, 0] % 90 + 4
    reach = ours.config.num_hidden_layers * (ours.config.sliding_window - 1)
    with torch.no_grad():
        difference = (ours(ids).logits - ours(changed).logits).abs().amax(-1)[0]
    assert difference[reach + 1 :].max() < 1e-5
    assert difference[: reach + 1].max() > 1e-3
