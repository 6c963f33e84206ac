"""Models on TransformerEngine, by a stand-in on CPUs: the same values, parameters and checkpoints as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from automodel import NeMoAutoModelForCausalLM
from automodel.attention_backends import resolve_sdpa, resolve_spans
from automodel.backends import Backend, resolve_norm
from automodel.expert_backends import resolve_experts
from automodel.models.causal_lm import NativeCausalLM
from automodel.models.deepseek_v3 import NeMoDeepseekV3ForCausalLM
from automodel.models.linear import Linear, resolve_linear
from ckpt_tools.core.errors import UsageError
from tests.automodel.te_stand_in import fp8_wins, stand_in  # noqa: F401
from tests.automodel.tiny import VOCABULARY, gpt_oss_model, moe_model
from tests.automodel.tiny import deepseek_v3_model as tiny_deepseek_v3

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def deepseek_v3_model() -> NativeCausalLM:
    """One with heads of 16, which TransformerEngine's attention takes."""
    config = tiny_deepseek_v3().config
    config.qk_rope_head_dim = config.head_dim = 8
    torch.manual_seed(0)
    return NeMoDeepseekV3ForCausalLM(config)


FAMILIES = {"qwen3_moe": moe_model, "gpt_oss": gpt_oss_model, "deepseek_v3": deepseek_v3_model}
on_te = pytest.mark.usefixtures("stand_in")
with_fp8 = pytest.mark.usefixtures("stand_in", "fp8_wins")


def twins(family: str, backend: object) -> tuple[NativeCausalLM, NativeCausalLM]:
    """A model of a family on `backend`, and the same on torch's kernels, in BF16."""
    models = []
    for chosen in (backend, "torch"):
        model = FAMILIES[family]().to(torch.bfloat16)
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = Backend.parse(chosen)
        models.append(model)
    return models[0], models[1]


def batch(*, packed: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, 32))
    positions = torch.cat([torch.arange(n) for n in (11, 21)]).expand(2, -1)
    return {"input_ids": ids, "labels": ids, **({"position_ids": positions} if packed else {})}


@on_te
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_losses_and_gradients_are_those_of_torchs_kernels(family: str, packed: bool) -> None:
    results = []
    for model in twins(family, "te"):
        out = model(**batch(packed=packed), use_cache=False)
        out.loss.backward()
        results.append((out.logits.float(), out.loss.float(), model.model.layers[0].self_attn.o_proj.weight.grad))
    (logits, loss, grad), (reference, expected, theirs) = results
    # The median: rounding sends a few tokens to another expert.
    assert (logits - reference).square().mean(-1).sqrt().median() < 0.03 * reference.square().mean().sqrt()
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    assert (grad - theirs).norm() < 0.15 * theirs.norm()


@on_te
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_the_kernels_differs(family: str, tmp_path: Path) -> None:
    model, reference = twins(family, "te")
    model(**batch(), use_cache=False).loss.backward()
    mine, theirs = model.state_dict(), reference.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in theirs)
    model.save_pretrained(tmp_path)
    again = NeMoAutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", backend="torch")
    assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())


@with_fp8
def test_fp8_is_for_wide_linear_layers_and_no_router_head_or_embedding() -> None:
    model, reference = twins("qwen3_moe", {"linear": "fp8"})
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    loss, expected = (m(**batch(), use_cache=False).loss for m in (model, reference))
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    ours = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert ours == {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("qkv_proj", "o_proj")}
    assert set(seen) - ours == {"lm_head"}
    rows = [(row.kernel, row.count, row.reason) for row in model.backend_report().rows if row.layer == "linear"]
    assert rows == [("fp8", 4, "torch where there are fewer than 16 tokens"), ("torch", 1, "the head and gates")]


@with_fp8
def test_a_layer_in_fp8_is_compiled_without_a_break() -> None:
    layer = Linear(64, 32, Backend(linear="fp8"), bias=True).to(torch.bfloat16)
    x = torch.randn(4, 16, 64, dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(run(x).float().square().sum(), layer.parameters()) for run in (layer, compiled)]
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference)


@with_fp8
def test_linear_layers_run_what_was_asked_for_where_that_pays() -> None:
    def resolved(linear: str, rows: int | None, values_in: int, values_out: int) -> tuple[str, str]:
        how = resolve_linear(Backend(linear=linear), CUDA, torch.bfloat16, rows, values_in, values_out)
        return how.kernel, how.reason

    assert resolved("auto", 64, 64, 64) == ("torch", "")
    assert resolved("torch", 64, 64, 64) == ("torch", "asked for")
    assert resolved("te", 64, 64, 64) == ("te", "")
    assert resolved("te", 7, 64, 64) == ("torch", "te takes multiples of 8, not 7")
    assert resolved("fp8", 64, 64, 64) == ("fp8", "")
    assert resolved("fp8", None, 64, 64) == ("fp8", "torch where there are fewer than 16 tokens")
    assert resolved("fp8", 64, 16, 64) == ("torch", "fp8 pays for weights from 32 x 32 on")
    assert resolved("fp8_block", 64, 256, 256) == ("torch", "fp8_block takes multiples of 128, not 64")


def test_transformer_engine_by_name_where_it_cannot_run_is_an_error_with_a_hint() -> None:
    calls = {
        "sdpa": lambda backend: resolve_sdpa(backend, CPU, torch.bfloat16, 64),
        "norm": lambda backend: resolve_norm(backend, CPU, torch.bfloat16),
        "experts": lambda backend: resolve_experts(backend, CPU, torch.bfloat16, 64, 32),
        "linear": lambda backend: resolve_linear(backend, CPU, torch.bfloat16, 64, 64, 64),
    }
    assert {"te"} == {getattr(Backend.parse("te"), layer) for layer in calls}
    for layer, resolve in calls.items():
        with pytest.raises(UsageError, match="TransformerEngine needs CUDA") as error:
            resolve(Backend(**{layer: "te"}))
        assert error.value.hint
    with pytest.raises(UsageError, match="TransformerEngine needs CUDA"):
        NeMoAutoModelForCausalLM.from_config(moe_model().config, dtype=torch.bfloat16, backend="te")


@on_te
def test_packed_documents_take_the_fastest_kernel_that_is_there() -> None:
    packed = resolve_spans(Backend(), CUDA, torch.bfloat16, 64)
    assert (packed.kernel, packed.reason) == ("te", "FlashAttention-4 (flash-attn-4) is not installed")
    assert resolve_sdpa(Backend(), CUDA, torch.bfloat16, 64).kernel == "cudnn"
    assert resolve_sdpa(Backend(sdpa="te"), CUDA, torch.bfloat16, 64).kernel == "te"
    assert resolve_spans(Backend(sdpa="cudnn"), CUDA, torch.bfloat16, 64).kernel == "flash"


def test_on_cpus_packed_documents_have_a_mask() -> None:
    without = resolve_spans(Backend(), CPU, torch.bfloat16, 64)
    assert (without.kernel, without.reason) == ("mask", "flash attention needs CUDA")
