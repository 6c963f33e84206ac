"""Every native family computes what transformers' class of the same weights computes."""

from __future__ import annotations

import pytest
import torch

from automodel.compat import TRANSFORMERS_5
from tests.automodel.helpers import every_config, installed, native_state, pair, relative, tokens


@every_config
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float32_logits_agree_within_rounding(name: str, attention: str) -> None:
    theirs, ours = pair(name, attention=attention)
    ids = tokens(2, 14)
    with torch.no_grad():
        assert relative(ours(ids).logits, theirs(ids).logits) < 1e-5


@every_config
def test_bfloat16_logits_are_as_close_to_float32_as_those_of_transformers(name: str) -> None:
    ids = tokens(4, 14)
    with torch.no_grad():
        exact = pair(name)[0](ids).logits.double()
        theirs, ours = (model(ids).logits for model in pair(name, dtype=torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    # The median over positions: rounding sends a few tokens of a tiny model to another expert.
    error_theirs, error_ours = ((x.double() - exact).square().mean(-1).sqrt().median() for x in (theirs, ours))
    assert error_ours < 1.3 * error_theirs
    # A recurrence carries its rounding along; that of transformers is as far off.
    bound = 0.03 if name.startswith(("qwen3_next", "qwen3_5")) else 0.02
    assert error_ours < bound * exact.square().mean().sqrt()


@every_config
def test_loss_and_every_gradient_agree(name: str) -> None:
    theirs, ours = pair(name)
    ids = tokens(2, 14)
    labels = ids.clone()
    labels[:, :3] = -100
    theirs(ids, labels=labels).loss.backward()
    loss = ours(ids, labels=labels).loss
    loss.backward()
    assert torch.isclose(loss, theirs(ids, labels=labels).loss, rtol=1e-6)
    expected = native_state({n: _grad(p) for n, p in theirs.named_parameters()}, theirs.config)
    actual = {n: _grad(p) for n, p in ours.named_parameters()}
    assert actual.keys() == expected.keys()
    errors = {n: relative(actual[n], expected[n]) for n in actual}
    # Those of a decay are sums over all tokens that almost cancel.
    wrong = {n: error for n, error in errors.items() if error > (2e-4 if ".decay." in n else 2e-5)}
    assert not wrong


def _grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    # The per-expert parameters of transformers 4 that no token reached have no gradient.
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize("name", ["qwen3_moe", "llama"])
def test_loss_arguments_mean_what_they_mean_in_transformers(name: str) -> None:
    theirs, ours = pair(name)
    ids = tokens(2, 14)
    for arguments in (
        {"labels": ids, "num_items_in_batch": 100},
        {"labels": ids, "num_items_in_batch": torch.tensor(7)},
        {"labels": ids, "shift_labels": ids.roll(-2, 1)},
        {"labels": ids, "ignore_index": int(ids[0, 3])},
    ):
        with torch.no_grad():
            assert torch.isclose(ours(ids, **arguments).loss, theirs(ids, **arguments).loss, rtol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2 sliding layers"])
@pytest.mark.parametrize("kept", [1, 3, torch.tensor([2, 5])])
def test_logits_to_keep_selects_positions(name: str, kept: int | torch.Tensor) -> None:
    theirs, ours = pair(name)
    ids = tokens(2, 9)
    with torch.no_grad():
        actual, expected = ours(ids, logits_to_keep=kept).logits, theirs(ids, logits_to_keep=kept).logits
    assert actual.shape == expected.shape
    assert relative(actual, expected) < 1e-5


@pytest.mark.parametrize(
    "name", installed("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "llama", "nemotron_h")
)
def test_hidden_states_and_attentions_agree(name: str) -> None:
    theirs, ours = pair(name, attention="eager")
    ids = tokens(2, 9)
    with torch.no_grad():
        actual = ours(ids, output_hidden_states=True, output_attentions=True)
        expected = theirs(ids, output_hidden_states=True, output_attentions=True)
    for field in ("hidden_states", "attentions"):
        assert len(actual[field]) == len(expected[field])
        assert all(relative(a, e) < 1e-5 for a, e in zip(actual[field], expected[field], strict=True))


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "qwen3_moe sparse step, no renormalisation, biases", "mixtral", "gpt_oss", "qwen3_next"]
)
@pytest.mark.parametrize("padded", [False, True])
def test_router_logits_and_auxiliary_loss_agree(name: str, padded: bool) -> None:
    theirs, ours = pair(name)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    arguments = {"labels": ids, "output_router_logits": True, "attention_mask": mask if padded else None}
    actual, expected = ours(ids, **arguments), theirs(ids, **arguments)
    if name == "gpt_oss" and not TRANSFORMERS_5:
        # What 4.57 returns as this family's router logits are the weights of the chosen experts.
        chosen = [logits.topk(2) for logits in actual.router_logits]
        weights = [torch.zeros(18, 6).scatter(1, top.indices, top.values.softmax(-1)) for top in chosen]
        assert all(relative(a, e) < 1e-5 for a, e in zip(weights, expected.router_logits, strict=True))
        return
    assert len(actual.router_logits) == len(expected.router_logits)
    assert all(relative(a, e) < 1e-5 for a, e in zip(actual.router_logits, expected.router_logits, strict=True))
    assert torch.isclose(actual.aux_loss, expected.aux_loss, rtol=1e-5)
    assert torch.isclose(actual.loss, expected.loss, rtol=1e-6)
    ours.zero_grad()
    actual.aux_loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in ours.named_parameters() if "mlp.gate." in n)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama"])
def test_tuples_are_returned_on_request(name: str) -> None:
    theirs, ours = pair(name)
    ids = tokens(1, 5)
    with torch.no_grad():
        actual, expected = (m(ids, labels=ids, return_dict=False, use_cache=False) for m in (ours, theirs))
    assert isinstance(actual, tuple)
    assert torch.isclose(actual[0], expected[0])
    assert relative(actual[1], expected[1]) < 1e-5


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3"])
def test_input_embeddings_replace_ids(name: str) -> None:
    _, ours = pair(name)
    ids = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(ours(inputs_embeds=ours.get_input_embeddings()(ids)).logits, ours(ids).logits)
