"""Selective activation checkpointing: the same gradients from less memory, and attention does not run again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from automodel import MeshConfig
from automodel.kernels import attention_calls
from automodel.kernels.flash import Spans, causal_attention
from automodel.models import NATIVE_MODELS, NativeCausalLM, layer
from automodel.models.checkpointing import keeping_attention
from automodel.models.decoder import DecoderLayer
from automodel.parallel.fsdp import parallelize
from automodel.parallel.mesh import ParallelMesh
from ckpt_tools.core.errors import UsageError
from tests.automodel.helpers import CONFIGS, installed, relative, tokens
from tests.automodel.ranks import run_ranks

ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"
PRODUCTS = ("aten.mm.default", "aten.addmm.default")
NAMES = installed("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "nemotron_h")


class Operations(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def learn(model: NativeCausalLM) -> tuple[list[torch.Tensor], int, Counter[str]]:
    """Loss and gradients, the bytes that autograd kept, and the operations of the backward pass."""
    model.zero_grad()
    ids = tokens(2, 12)
    kept = []
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels=ids, use_cache=False).loss
    with Operations() as operations:
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], sum(kept), operations.counts


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_from_less_memory_and_attention_runs_once(name: str) -> None:
    torch.manual_seed(0)
    model = NATIVE_MODELS[name](CONFIGS[name]()).train()
    expected, kept, plain = learn(model)
    model.selective_checkpointing_enable()
    assert model.is_selective_checkpointing
    actual, kept_less, again = learn(model)
    assert max(map(relative, actual, expected)) < 1e-6
    assert kept_less < 0.95 * kept
    assert sum(again[product] for product in PRODUCTS) > sum(plain[product] for product in PRODUCTS)
    assert again[ATTENTION] == plain[ATTENTION] == 0
    model.selective_checkpointing_enable(False)
    assert not model.is_selective_checkpointing
    assert learn(model)[1] == kept


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_compiled_layers_make_the_same_selection(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(DecoderLayer._run, backend="aot_eager")
    monkeypatch.setattr(layer, "_compiled", lambda _: compiled)
    torch.manual_seed(0)
    model = NATIVE_MODELS[name](CONFIGS[name](), backend={"layers": "compiled"}).train().bfloat16()
    torch._dynamo.reset()
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    expected, kept, _ = learn(model)
    model.selective_checkpointing_enable()
    actual, kept_less, again = learn(model)
    assert max(map(relative, actual, expected)) < 1e-2
    assert kept_less < kept
    assert again[ATTENTION] == 0
    assert not breaks


def test_dropout_of_attention_is_refused() -> None:
    config = CONFIGS["qwen3_moe"]()
    config.attention_dropout = 0.5
    model = NATIVE_MODELS["qwen3_moe"](config)
    with pytest.raises(UsageError, match="attention drops out"):
        model.selective_checkpointing_enable()
    assert not model.is_selective_checkpointing
    model.selective_checkpointing_enable(False)


def test_attention_without_masks_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    reference = attention_calls.KERNELS["reference"]

    def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append("attention")
        return reference.forward(*inputs)

    monkeypatch.setitem(
        attention_calls.KERNELS, "reference", attention_calls.AttentionKernel(forward, reference.backward)
    )

    def attend(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        calls.append("projection")
        heads = x.sin().unflatten(-1, (2, 8))
        return causal_attention(heads, heads, heads, Spans(None, 5, 0, "reference"), scale=1.0), None

    x = torch.randn(1, 5, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(attend(x)[0].sum(), x)
    calls.clear()
    (actual,) = torch.autograd.grad(keeping_attention(attend, x)[0].sum(), x)
    assert calls == ["projection", "attention", "projection"]
    assert torch.equal(actual, expected)


def _sharded(selective: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = NATIVE_MODELS["qwen3_moe"](CONFIGS["qwen3_moe"]()).train()
    # Layers are freed after the forward pass, and gathered again before they are computed again.
    parallelize(model, ParallelMesh.of(MeshConfig(dp_shard=2).build()), reshard_after_forward=True)
    model.selective_checkpointing_enable(selective)
    ids = tokens(2, 12)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.full_tensor() for p in model.parameters())]


def test_sharded_layers_are_gathered_before_they_are_computed_again() -> None:
    plain, selective = (run_ranks(2, _sharded, how)[0] for how in (False, True))
    assert max(map(relative, selective, plain)) < 1e-6


def test_nothing_is_selected_without_training() -> None:
    model = NATIVE_MODELS["qwen3_moe"](CONFIGS["qwen3_moe"]()).eval()
    model.selective_checkpointing_enable()
    ids = tokens(1, 6)
    expected = model(ids).logits
    past = model(ids[:, :4], use_cache=True)
    assert relative(model(ids[:, 4:], past_key_values=past.past_key_values).logits, expected[:, 4:]) < 1e-5
