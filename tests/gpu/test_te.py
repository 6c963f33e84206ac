"""TransformerEngine itself, where it is installed: against float64, against its stand-in, and in models.

`tests/automodel/kernels/test_flash.py` has its attention. Run on a machine with a GPU: `python -m pytest tests/gpu`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
F = torch.nn.functional
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs TransformerEngine"),
]

STAND_IN = Path(__file__).parents[1] / "automodel" / "stand_ins" / "transformer_engine"
CALLED = {
    "pytorch": ["get_cudnn_version", "is_fp8_available", "is_fp8_block_scaling_available"],
    "pytorch.cpp_extensions": ["general_gemm", "general_grouped_gemm"],
    "pytorch.cpp_extensions.fused_attn": ["fused_attn_fwd", "fused_attn_bwd"],
}
# What TransformerEngine 2.20.2 had on an H200: of the output, and of the gradients.
ERRORS = {"te": (1.7e-3, 1.7e-3), "fp8": (3.8e-2, 5.9e-2), "fp8_block": (3.8e-2, 3.8e-2)}


@pytest.fixture(scope="module")
def stand_in() -> ModuleType:
    """The stand-in's package under another name, beside the real one."""
    init = STAND_IN / "__init__.py"
    spec = importlib.util.spec_from_file_location("te_stand_in", init, submodule_search_locations=[str(STAND_IN)])
    module = importlib.util.module_from_spec(spec)
    importlib.sys.modules["te_stand_in"] = module
    spec.loader.exec_module(module)
    return module


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def leaves(*shapes: tuple[int, ...], scale: float = 1.0) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(shape, device="cuda") * scale).bfloat16().requires_grad_() for shape in shapes]


def test_nothing_keeps_it_from_running() -> None:
    from automodel.kernels.te import te_attention_obstacle, te_linear_obstacle

    device = torch.device("cuda", 0)
    assert te_attention_obstacle(device, torch.bfloat16, 128) is None
    for kernel in ERRORS:
        assert te_linear_obstacle(kernel, device, torch.bfloat16) is None


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("module", CALLED)
def test_the_stand_in_has_the_signatures_of_the_package(module: str) -> None:
    theirs = importlib.import_module(f"transformer_engine.{module}")
    ours = importlib.import_module(f"te_stand_in.{module}")
    for name in CALLED[module]:
        real, fake = (inspect.signature(getattr(m, name)).parameters.values() for m in (theirs, ours))
        assert [(p.name, p.kind, p.default) for p in fake] == [(p.name, p.kind, p.default) for p in real], name
    if module == "pytorch":
        for name in ("Float8CurrentScalingQuantizer", "Float8BlockQuantizer"):
            real, fake = (list(inspect.signature(getattr(m, name).__init__).parameters) for m in (theirs, ours))
            assert fake == real, name


@pytest.mark.parametrize("kernel", ERRORS)
def test_linear_layers_err_as_much_as_was_measured(kernel: str) -> None:
    from automodel.kernels.te_linear import te_linear

    tensors = leaves((2, 512, 768), (384, 768), (384,))
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    actual, expected = te_linear(*tensors, kernel), F.linear(*doubles)
    grad = torch.randn_like(expected).bfloat16()
    mine = torch.autograd.grad(actual, tensors, grad)
    references = torch.autograd.grad(expected, doubles, grad.double())
    forward, backward = ERRORS[kernel]
    assert relative(actual, expected) < 1.3 * forward
    assert max(relative(a, b) for a, b in zip(mine[:2], references[:2], strict=True)) < 1.3 * backward
    assert relative(mine[2], references[2]) < 1e-2


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kernel", ["fp8", "fp8_block"])
def test_the_stand_in_rounds_as_the_package_does(kernel: str) -> None:
    """The products of both differ by the order of their sums, far less than either does from the exact one."""
    from automodel.kernels.te_linear import te_linear

    x, weight = (tensor.detach() for tensor in leaves((256, 384), (128, 384)))
    theirs = importlib.import_module("te_stand_in.pytorch")
    products = importlib.import_module("te_stand_in.pytorch.cpp_extensions")
    if kernel == "fp8":
        quantize = theirs.Float8CurrentScalingQuantizer(theirs.DType.kFloat8E4M3, x.device)
        rounded = [quantize(weight), quantize(x)]
    else:
        options = {"rowwise": True, "columnwise": False}
        rounded = [
            theirs.Float8BlockQuantizer(theirs.DType.kFloat8E4M3, block_scaling_dim=dim, **options)(matrix)
            for dim, matrix in ((2, weight), (1, x))
        ]
    expected = products.general_gemm(*rounded, out_dtype=torch.bfloat16)[0]
    assert relative(te_linear(x, weight, None, kernel), expected) < 6e-3


def test_the_operations_obey_the_rules_of_torch() -> None:
    from automodel.kernels import te_linear, te_norm  # noqa: F401  registers them

    x, weight, bias = leaves((16, 32), (48, 32), (48,))
    torch.library.opcheck(torch.ops.automodel.te_linear.default, (x, weight, bias, "fp8"))
    torch.library.opcheck(torch.ops.automodel.te_rms_norm.default, (x, bias[:32].detach(), 1e-6, True))


@pytest.mark.parametrize("zero_centred", [False, True])
def test_norms_round_once(zero_centred: bool) -> None:
    from automodel.kernels.te_norm import te_rms_norm

    tensors = leaves((3, 100, 512), (512,))
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    actual = te_rms_norm(*tensors, 1e-6, zero_centred=zero_centred)
    expected = F.rms_norm(doubles[0], (512,), doubles[1] + zero_centred, 1e-6)
    grad = torch.randn_like(expected)
    mine = torch.autograd.grad(actual, tensors, grad.bfloat16())
    theirs = torch.autograd.grad(expected, doubles, grad)
    assert max(relative(a, b) for a, b in zip((actual, *mine), (expected, *theirs), strict=True)) < 5e-3


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("counts", [(64, 0, 200, 56), (0, 0, 0, 0)], ids=str)
def test_experts_follow_the_reference_through_grouped_products(counts: tuple[int, ...], biases: bool) -> None:
    from automodel.kernels.activations import SWIGLU
    from automodel.kernels.experts import expert_mlp

    experts = len(counts)
    shapes = [(sum(counts), 128), (experts, 512, 128), (experts, 128, 256), (experts, 512), (experts, 128)]
    results = []
    for kernel in ("te", "torch"):
        tensors = leaves(*shapes[: 5 if biases else 3], scale=0.2)
        x, gate_up, down, gate_up_bias, down_bias = (*tensors, None, None)[:5]
        options = {"gate_up_bias_E2F": gate_up_bias, "down_bias_ED": down_bias}
        out = expert_mlp(x, torch.tensor(counts, device="cuda"), gate_up, down, kernel, SWIGLU, **options)
        results.append((out, *torch.autograd.grad(out.sum(), tensors)))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=2e-2, atol=2e-2)


SMALL = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
FAMILIES = {
    "qwen3_moe": {**SMALL, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128},
    "gpt_oss": {**SMALL, "num_local_experts": 16, "num_experts_per_tok": 4, "sliding_window": 64},
    "deepseek_v3": {
        **SMALL,
        "num_key_value_heads": 8,
        "head_dim": 32,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
    "llama": SMALL,
}


@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_transformer_engine_computes_what_it_computes_otherwise(family: str, packed: bool) -> None:
    from automodel import NeMoAutoModelForCausalLM

    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    ids = torch.randint(0, 512, (2, 256), device="cuda")
    positions = torch.cat([torch.arange(n, device="cuda") for n in (100, 156)]).expand(2, -1) if packed else None
    results = []
    for backend in ("te", {"experts": "grouped_mm", "sdpa": "torch", "norm": "fused", "layers": "eager"}):
        torch.manual_seed(0)
        model = NeMoAutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, device="cuda", backend=backend)
        out = model.train()(ids, position_ids=positions, labels=ids, use_cache=False)
        out.loss.backward()
        results.append((out, model))
    (mine, on_te), (reference, otherwise) = results
    error = (mine.logits - reference.logits).float().square().mean(-1).sqrt().median()
    # The median: rounding sends a few tokens to another expert.
    assert error < 0.03 * reference.logits.float().square().mean().sqrt()
    assert torch.isclose(mine.loss, reference.loss, rtol=5e-3)
    grads = (model.model.layers[0].self_attn.o_proj.weight.grad for model in (on_te, otherwise))
    assert relative(*grads) < 0.15
    runs = {(row.layer, row.kernel) for row in on_te.backend_report().rows}
    assert {("attention", "TransformerEngine"), ("packed or windowed", "te"), ("norm", "te"), ("linear", "te")} <= runs
    assert on_te.state_dict().keys() == otherwise.state_dict().keys()


@pytest.mark.parametrize("layers", ["eager", "compiled"])
def test_training_in_fp8_follows_training_in_bf16(layers: str) -> None:
    """One layer of the sizes from which FP8 pays, 16,384 tokens a step, none of them twice: what is learnt by heart
    would depend on rounding."""
    from automodel import NeMoAutoModelForCausalLM

    sizes = {**SMALL, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128})
    torch.manual_seed(0)
    batches = [torch.randint(0, 64, (16, 1024), device="cuda") for _ in range(20)]
    losses = []
    for linear in ("fp8", "torch"):
        torch.manual_seed(0)
        backend = {"linear": linear, "layers": layers}
        model = NeMoAutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, device="cuda", backend=backend)
        rows = [row for row in model.backend_report().rows if row.layer == "linear"]
        assert [(row.kernel, row.count) for row in rows] == (
            [("fp8", 2), ("torch", 2), ("torch", 1)] if linear == "fp8" else [("torch", 5)]
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        model.train()
        losses.append([])
        for batch in batches:
            loss = model(batch, labels=batch, use_cache=False, skip_logits=True).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss))
    in_fp8, in_bf16 = losses
    assert in_fp8[-1] < 0.9 * in_fp8[0]
    assert all(math.isclose(a, b, rel_tol=0.05) for a, b in zip(in_fp8, in_bf16, strict=True)), (in_fp8, in_bf16)
    assert in_fp8 != in_bf16
