"""Packed documents and sliding windows without masks give what they give under masks, in every kind of attention."""

from __future__ import annotations

import pytest
import torch

from automodel.attention_backends import resolve_sdpa, resolve_spans
from automodel.backends import Backend, Resolved
from automodel.compat import TRANSFORMERS_5
from automodel.kernels.flash import Spans
from automodel.models import masking
from tests.automodel.tiny import (
    batch,
    deepseek_v3_model,
    dense_model,
    gpt_oss_model,
    nemotron_h_model,
    qwen3_next_model,
)

MODELS = {
    "dense": dense_model,
    "gpt_oss": gpt_oss_model,
    "deepseek_v3": deepseek_v3_model,
    "qwen3_next": qwen3_next_model,
}
if TRANSFORMERS_5:
    MODELS["nemotron_h"] = nemotron_h_model
LENGTH = 12


def gradients_and_logits(model, ids, positions):
    model.zero_grad()
    output = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
    output.loss.backward()
    return [output.logits, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_spans_say_what_masks_say(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]().train()
    ids = batch(2, LENGTH)
    positions = torch.arange(LENGTH).expand(2, -1)
    if packed:
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((5, 7), (1, 3, 8))])
    expected = gradients_and_logits(model, ids, positions)
    seen = []

    def spans(*arguments: object, **options: object):
        masks = made(*arguments, **options)
        seen.extend(masks.values())
        return masks

    made = masking.attention_masks
    monkeypatch.setattr(masking, "resolve_spans", lambda *_: Resolved("reference"))
    for module in ("decoder", "hybrid"):
        monkeypatch.setattr(f"automodel.models.{module}.attention_masks", spans)
    actual = gradients_and_logits(model, ids, positions)
    assert any(isinstance(mask, Spans) for mask in seen) == (packed or name == "gpt_oss")
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_kernel_is_chosen_by_what_can_run() -> None:
    cpu, cuda, half = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
    assert resolve_spans(Backend(), cpu, half, 64) == Resolved("mask", "flash attention needs CUDA")
    assert resolve_spans(Backend(sdpa="torch"), cuda, half, 64) == Resolved("mask", "asked for")
    assert resolve_spans(Backend(sdpa="cudnn"), cuda, half, 64).kernel == "flash"
    assert resolve_sdpa(Backend(sdpa="cudnn"), cpu, half, 64).kernel == "cudnn"
    assert resolve_sdpa(Backend(), cpu, torch.float32, 64).kernel == "torch"
