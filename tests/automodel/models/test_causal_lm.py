"""What a native model offers as a PreTrainedModel, apart from the numbers."""

from __future__ import annotations

import pytest
import torch
import transformers

from automodel.models import NATIVE_MODELS, NeMoLlamaForCausalLM, NeMoQwen3MoeForCausalLM, layer
from automodel.models.decoder import DecoderLayer
from ckpt_tools.core.errors import UsageError
from tests.automodel.helpers import CONFIGS, every_config, installed, pair, relative, tokens


@every_config
def test_saved_architecture_exists_in_transformers(name: str) -> None:
    config = CONFIGS[name]()
    architecture = NATIVE_MODELS[config.model_type].transformers_architecture
    assert getattr(transformers, architecture).config_class is type(config)


@every_config
def test_initialisation_has_the_spread_that_the_config_asks_for(name: str) -> None:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = NATIVE_MODELS[config.model_type](config)
    for parameter_name, parameter in model.named_parameters():
        if ".ssm." in parameter_name or ".decay." in parameter_name:
            continue  # have values of their own: see test_mamba.py and test_qwen3_next.py
        if "norm" in parameter_name:
            zero_centred = model.spec.zero_centred_norms and "linear_attn" not in parameter_name
            assert bool((parameter == (not zero_centred)).all())
        elif parameter_name.endswith("bias") and "mlp.gate." not in parameter_name:
            assert not parameter.any()
        elif parameter.ndim == 1:
            # Too few values for a spread: sinks, and the bias of a router.
            assert 0 < parameter.abs().max() < 5 * config.initializer_range
        else:
            assert parameter.std().item() == pytest.approx(config.initializer_range, rel=0.2), parameter_name
    assert not model.model.embed_tokens.weight[config.pad_token_id].any()


def test_tied_embeddings_are_one_parameter() -> None:
    config = CONFIGS["qwen3"]()
    model = NATIVE_MODELS["qwen3"](config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize(
    "name", installed("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "llama", "nemotron_h latent experts")
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(name: str, reentrant: bool) -> None:
    _, ours = pair(name)
    ours.train()
    ids = tokens(2, 9)

    def gradients() -> dict[str, torch.Tensor]:
        ours.zero_grad()
        ours(ids, labels=ids, output_router_logits=True).loss.backward()
        return {n: p.grad.clone() for n, p in ours.named_parameters()}

    expected = gradients()
    if reentrant:
        ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    next(iter(ours.model.layers[0].children())).register_forward_hook(lambda *_: calls.append(1))
    actual = gradients()
    assert len(calls) == 2, "the layer was not run again in the backward pass"
    assert all(relative(actual[n], expected[n]) < 1e-6 for n in expected)


def test_unknown_attention_is_refused_with_the_known_ones() -> None:
    config = CONFIGS["llama"]()
    config._attn_implementation = "flash_attention_2"
    with pytest.raises(UsageError, match="flash_attention_2") as error:
        NeMoLlamaForCausalLM(config)
    assert "sdpa" in error.value.hint


def test_attention_weights_are_refused_where_the_kernel_has_none() -> None:
    with pytest.raises(UsageError, match="no attention weights") as error:
        pair("llama")[1](tokens(1, 3), output_attentions=True)
    assert "eager" in error.value.hint


def test_ids_and_embeddings_exclude_each_other() -> None:
    _, ours = pair("llama")
    with pytest.raises(UsageError, match="exactly one"):
        ours()
    with pytest.raises(UsageError, match="exactly one"):
        ours(tokens(1, 3), inputs_embeds=torch.zeros(1, 3, 32))


def test_token_embeddings_can_be_resized() -> None:
    _, ours = pair("qwen3")
    before = ours(tokens(1, 4)).logits
    ours.resize_token_embeddings(103)
    after = ours(tokens(1, 4)).logits
    assert after.shape[-1] == ours.config.vocab_size == 103
    assert torch.equal(after[..., :97], before)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_can_be_compiled(name: str, dtype: torch.dtype) -> None:
    _, ours = pair(name, dtype=dtype)
    last = ours.model.layers[-1]
    x = torch.randn(1, 6, 32, dtype=dtype)
    cos, sin = ours.model.rotary_emb(x, torch.arange(6)[None])
    expected = last(x, cos, sin, None, "sdpa")[0]
    # The expert loop of other dtypes reads the counts on the host, which breaks the graph.
    compiled = torch.compile(last, fullgraph=dtype == torch.bfloat16, backend="aot_eager")
    assert relative(compiled(x, cos, sin, None, "sdpa")[0], expected) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(("name", "dtype"), [("qwen3_moe", torch.bfloat16), ("mixtral", torch.float32)])
def test_routing_weights_have_the_dtype_that_transformers_5_gives_the_family(name: str, dtype: torch.dtype) -> None:
    _, ours = pair(name, dtype=torch.bfloat16)
    _, weights, _ = ours.model.layers[0].mlp.gate(torch.randn(4, 32, dtype=torch.bfloat16))
    assert weights.dtype == dtype


def test_the_backend_report_covers_every_kind_of_layer() -> None:
    model = NeMoQwen3MoeForCausalLM(CONFIGS["qwen3_moe"]())
    report = model.backend_report()
    layers = ["attention", "experts", "router", "packed or windowed", "norm", "linear", "layers", "loss"]
    assert [row.layer for row in report.rows] == layers
    assert {row.layer: row.count for row in report.rows}["experts"] == 2
    assert "grouped_mm" in str(report)
    gpt_oss = NATIVE_MODELS["gpt_oss"](CONFIGS["gpt_oss"]()).backend_report()
    assert [(row.layer, row.count, row.kernel) for row in gpt_oss.rows] == [
        ("attention", 3, "sdpa"),
        ("experts", 3, "grouped_mm"),
        ("router", 3, "torch"),
        ("packed or windowed", 3, "mask"),
        ("norm", 7, "torch"),
        ("linear", 7, "torch"),
        ("layers", 3, "eager"),
        ("loss", 1, "torch"),
    ]
    slow = NeMoQwen3MoeForCausalLM(CONFIGS["qwen3_moe"](), backend="torch").backend_report()
    assert {row.layer: (row.kernel, row.reason) for row in slow.rows}["experts"] == ("torch", "asked for")


@pytest.mark.parametrize("name", ["qwen3_moe", "llama"])
def test_compiled_layers_and_the_fused_loss_give_the_same_loss_and_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile(DecoderLayer._run, backend="aot_eager")
    monkeypatch.setattr(layer, "_compiled", lambda _: compiled)
    reference, fast = (
        NATIVE_MODELS[name](CONFIGS[name](), backend=backend).train()
        for backend in ("torch", {"layers": "compiled", "loss": "fused", "sdpa": "cudnn"})
    )
    fast.load_state_dict(reference.state_dict())
    ids = tokens(2, 8)
    expected, actual = reference(ids, labels=ids), fast(ids, labels=ids, skip_logits=True)
    assert actual.logits is None
    assert relative(actual.loss, expected.loss) < 1e-5
    expected.loss.backward()
    actual.loss.backward()
    for mine, theirs in zip(fast.parameters(), reference.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) < 1e-4


def test_logits_are_left_out_only_where_they_are_not_wanted() -> None:
    model = NATIVE_MODELS["llama"](CONFIGS["llama"](), backend={"loss": "fused"})
    ids = tokens(1, 4)
    assert model(ids, labels=ids).logits is not None
    assert model(ids, skip_logits=True).logits is not None
    assert model(ids, labels=ids, skip_logits=True).logits is None
