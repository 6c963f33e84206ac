"""A model computes the same loss, gradients and gradient norm on one process and on any mesh."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from automodel.compat import TRANSFORMERS_5
from automodel.parallel.fsdp import decoder_layers, parallelize
from automodel.parallel.grad_norm import clip_grad_norm_
from automodel.parallel.mesh import MeshConfig, MixedPrecision, data_parallel
from ckpt_tools.core.errors import UsageError
from tests.automodel.ranks import run_ranks
from tests.automodel.tiny import (
    batch,
    deepseek_v3_model,
    dense_model,
    gpt_oss_model,
    moe_model,
    nemotron_h_model,
    qwen3_next_model,
)

needs_transformers_5 = pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 has no Nemotron-H")
GLOBAL_ROWS = 4
MAX_NORM = 0.5


def step(build, mesh_config, micro_batches: int = 1, mixed_precision=None):
    """Loss, norm before clipping, clipped full gradients and placements of one step over the same global batch."""
    mesh = mesh_config.build()
    model = build()
    parallelize(model, mesh, mixed_precision=mixed_precision)
    rank, size = data_parallel(mesh)
    rows = batch(GLOBAL_ROWS)[rank * GLOBAL_ROWS // size : (rank + 1) * GLOBAL_ROWS // size]
    total = torch.zeros(())
    for part in rows.chunk(micro_batches):
        loss = model(input_ids=part, labels=part).loss / micro_batches
        loss.backward()
        total += loss.detach()
    if mesh is not None:
        torch.distributed.all_reduce(total)
    norm = clip_grad_norm_(model, MAX_NORM, mesh)
    gradients, placements = {}, {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor):
            placements[name] = [(type(p), getattr(p, "dim", None)) for p in parameter.placements]
            grad = grad.full_tensor()
        gradients[name] = grad
    return (total / size).item(), norm.item(), gradients, placements


def assert_same(single, ranks):
    for loss, norm, gradients, _ in ranks:
        assert loss == pytest.approx(single[0], rel=1e-5)
        assert norm == ranks[0][1], "the gradient norm differs between ranks"
        assert norm == pytest.approx(single[1], rel=1e-5)
        assert gradients.keys() == single[2].keys()
        for name, grad in gradients.items():
            torch.testing.assert_close(grad, single[2][name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


MESHES = {
    "FSDP over 2": MeshConfig(dp_shard=2),
    "EP over 2": MeshConfig(dp_shard=1, ep=2),
    "FSDP over 4": MeshConfig(dp_shard=4),
    "EP over 4": MeshConfig(dp_shard=1, ep=4),
    "FSDP over 2 x EP over 2": MeshConfig(dp_shard=2, ep=2),
    "HSDP 2 x 2": MeshConfig(dp_replicate=2, dp_shard=2),
    "replicas 2 x EP over 2": MeshConfig(dp_replicate=2, dp_shard=1, ep=2),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_loss_gradients_and_norm_equal_those_of_one_process(mesh):
    single = step(moe_model, MeshConfig())
    world = max(mesh.dp_shard, 1) * mesh.ep * mesh.dp_replicate
    assert_same(single, run_ranks(world, step, moe_model, mesh))


@pytest.mark.parametrize("num_experts", [6, 3])
@pytest.mark.parametrize("mesh", [MeshConfig(dp_shard=1, ep=4), MeshConfig(dp_shard=2, ep=2)], ids=["ep4", "fsdp2ep2"])
def test_experts_need_not_divide_by_the_processes(num_experts, mesh):
    # 6 over 4 leaves 2, 2, 2, 0 and 3 over 4 leaves 1, 1, 1, 0: DTensor's chunks, some of them empty.
    def build():
        return moe_model(num_experts)

    assert_same(step(build, MeshConfig()), run_ranks(4, step, build, mesh))


@pytest.mark.parametrize(
    ("mesh", "num_experts"),
    [
        (MeshConfig(dp_shard=1, ep=2), 4),
        (MeshConfig(dp_shard=2, ep=1), 4),
        (MeshConfig(dp_shard=2, ep=2), 3),
        (MeshConfig(dp_shard=1, ep=4), 3),
    ],
    ids=["ep2", "fsdp2", "fsdp2ep2, 3 experts", "ep4, 3 experts"],
)
def test_biases_of_experts_and_sinks_of_heads_are_sharded_too(mesh, num_experts):
    def build():
        return gpt_oss_model(num_experts)

    single = step(build, MeshConfig())
    ranks = run_ranks(mesh.dp_shard * mesh.ep, step, build, mesh)
    assert_same(single, ranks)
    biases = [name for name in single[2] if name.endswith(("proj_bias", "gate.bias", "sinks"))]
    assert len(biases) == 2 * 4
    assert all(single[2][name].abs().max() > 0 for name in biases)
    if mesh.ep > 1:
        placements = [kinds for name, kinds in ranks[0][3].items() if name.endswith("proj_bias")]
        assert all((Shard, 0) in kinds for kinds in placements)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(dp_shard=1, ep=2), MeshConfig(dp_shard=2), MeshConfig(dp_shard=2, ep=2), MeshConfig(dp_shard=1, ep=4)],
    ids=["ep2", "fsdp2", "fsdp2ep2", "ep4"],
)
def test_latent_attention_and_routing_by_groups_are_the_same_on_any_mesh(mesh):
    single = step(deepseek_v3_model, MeshConfig())
    ranks = run_ranks(mesh.dp_shard * mesh.ep, step, deepseek_v3_model, mesh)
    assert_same(single, ranks)
    without = [name for name, grad in single[2].items() if grad is None]
    assert without
    assert all(name.startswith("model.layers.2.") for name in without), "only the held layer has no gradients"


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(dp_shard=1, ep=2), MeshConfig(dp_shard=2), MeshConfig(dp_shard=2, ep=2), MeshConfig(dp_shard=1, ep=4)],
    ids=["ep2", "fsdp2", "fsdp2ep2", "ep4"],
)
def test_linear_attention_and_the_shared_expert_are_the_same_on_any_mesh(mesh):
    single = step(qwen3_next_model, MeshConfig())
    assert_same(single, run_ranks(mesh.dp_shard * mesh.ep, step, qwen3_next_model, mesh))
    without = [name for name, grad in single[2].items() if grad is None]
    assert without
    assert all(name.startswith("mtp.") for name in without), "only the held block has no gradients"


def _decay_in_forward(mesh_config):
    model = qwen3_next_model().bfloat16()
    decay = model.model.layers[0].linear_attn.decay
    decay.A_log.data.add_(2**-12)
    expected = decay.A_log.detach().clone()
    parallelize(model, mesh_config.build(), mixed_precision=MixedPrecision(torch.bfloat16, torch.float32))
    seen = []
    decay.register_forward_pre_hook(lambda module, _: seen.append(module.A_log.detach().clone()))
    model(input_ids=batch(2), labels=batch(2)).loss.backward()
    gradients = {decay.A_log.grad.dtype, model.model.layers[0].linear_attn.out_proj.weight.grad.dtype}
    return torch.equal(seen[0], expected), expected.dtype, gradients


def test_computing_in_bfloat16_leaves_the_decay_in_float32():
    for same, *dtypes in run_ranks(2, _decay_in_forward, MeshConfig(dp_shard=1, ep=2)):
        assert same
        assert dtypes == [torch.float32, {torch.float32, torch.bfloat16}]


def _norm_kernels(mesh_config):
    """What would run the norms of an FP32 model on an accelerator, and once it is sharded to compute in BF16."""
    model, accelerator = moe_model(), torch.device("meta")
    whole = model.backend_report(accelerator)
    parallelize(model, mesh_config.build(), mixed_precision=MixedPrecision(torch.bfloat16, torch.float32))
    reports = (whole, model.backend_report(accelerator))
    return [next(row.kernel for row in report.rows if row.layer == "norm") for report in reports]


def test_the_report_is_of_the_dtype_that_is_computed_in():
    assert run_ranks(2, _norm_kernels, MeshConfig(dp_shard=2)) == [["torch", "fused"]] * 2


def _bias_in_forward(mesh_config):
    model = deepseek_v3_model()
    expected = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    parallelize(model, mesh_config.build(), mixed_precision=MixedPrecision(torch.bfloat16, torch.float32))
    seen = []
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_pre_hook(lambda module, _: seen.append((module.weight, module.e_score_correction_bias)))
    model(input_ids=batch(2), labels=batch(2)).loss.backward()
    (weight, bias), *_ = seen
    return weight.dtype, torch.equal(bias, expected)


def test_computing_in_bfloat16_leaves_the_correction_bias_in_float32():
    assert run_ranks(2, _bias_in_forward, MeshConfig(dp_shard=1, ep=2)) == [(torch.bfloat16, True)] * 2


@needs_transformers_5
@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(dp_shard=1, ep=2), MeshConfig(dp_shard=2), MeshConfig(dp_shard=2, ep=2), MeshConfig(dp_shard=1, ep=4)],
    ids=["ep2", "fsdp2", "fsdp2ep2", "ep4"],
)
def test_state_spaces_and_latent_experts_are_the_same_on_any_mesh(mesh):
    single = step(nemotron_h_model, MeshConfig())
    ranks = run_ranks(mesh.dp_shard * mesh.ep, step, nemotron_h_model, mesh)
    assert_same(single, ranks)
    assert all((grad is None) == name.startswith("mtp.") for name, grad in single[2].items())
    assert all(single[2][f"model.layers.0.mixer.ssm.{name}"].abs().max() > 0 for name in ("A_log", "D", "dt_bias"))


def _state_space_in_forward(mesh_config, dtype):
    model = nemotron_h_model().to(dtype)
    ssm = model.model.layers[0].mixer.ssm
    expected = [-ssm.A_log.exp(), ssm.D.clone()]
    parallelize(model, mesh_config.build(), mixed_precision=MixedPrecision(torch.bfloat16, torch.float32))
    seen = []
    routed = []
    model.model.layers[1].mixer.gate.register_forward_pre_hook(lambda module, _: routed.append(module.weight.dtype))
    ssm.register_forward_hook(lambda _module, _args, values: seen.extend(value.detach() for value in values[1:]))
    projected = []
    model.model.layers[0].mixer.in_proj.register_forward_hook(lambda *given: projected.append(given[2].dtype))
    model(input_ids=batch(2), labels=batch(2)).loss.backward()
    equal = all(torch.equal(mine, theirs) for mine, theirs in zip(seen, expected, strict=True))
    return projected[0], routed[0], equal, ssm.A_log.grad.dtype


@needs_transformers_5
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_in_bfloat16_leaves_state_spaces_and_routers_in_float32(dtype):
    expected = (torch.bfloat16, torch.float32, True, torch.float32)
    assert run_ranks(2, _state_space_in_forward, MeshConfig(dp_shard=2), dtype) == [expected] * 2


def test_a_process_without_experts_works_beside_fsdp_and_mixed_precision():
    def build():
        return moe_model(2, num_experts_per_tok=1)

    def bf16_steps():
        return step(
            build, MeshConfig(dp_replicate=1, dp_shard=1, ep=4), 1, MixedPrecision(torch.bfloat16, torch.float32)
        )

    single = step(build, MeshConfig())
    for loss, norm, gradients, _ in run_ranks(4, bf16_steps):
        assert loss == pytest.approx(single[0], rel=1e-2)
        assert norm == pytest.approx(single[1], rel=5e-2)
        assert all(grad.dtype == torch.float32 for grad in gradients.values())


def test_the_norm_counts_replicas_once_and_dense_models_shard_too():
    single = step(dense_model, MeshConfig())
    assert_same(single, run_ranks(4, step, dense_model, MeshConfig(dp_replicate=2, dp_shard=2)))


def test_tied_embeddings_stay_one_parameter():
    def build():
        return dense_model(tie_word_embeddings=True)

    def tied():
        model = build()
        parallelize(model, MeshConfig(dp_shard=2).build())
        return model.lm_head.weight is model.model.embed_tokens.weight, *step(build, MeshConfig(dp_shard=2))

    single = step(build, MeshConfig())
    ranks = run_ranks(2, tied)
    assert all(same for same, *_ in ranks)
    assert_same(single, [rest for _, *rest in ranks])


def test_each_process_holds_one_plain_box_of_every_parameter():
    ranks = run_ranks(4, step, moe_model, MeshConfig(dp_shard=2, ep=2))
    placements = ranks[0][3]
    assert len(placements) == len(ranks[0][2])
    for name, kinds in placements.items():
        assert all(kind is not _StridedShard for kind, _ in kinds), f"{name} is interleaved: {kinds}"
    experts = [kinds for name, kinds in placements.items() if ".experts." in name]
    assert experts
    assert all(kinds == [(Shard, 1), (Shard, 0)] for kinds in experts)


def test_gradient_accumulation_gives_the_gradients_of_the_whole_batch():
    single = step(moe_model, MeshConfig())
    assert_same(single, run_ranks(2, step, moe_model, MeshConfig(dp_shard=1, ep=2), 2))


def test_expert_parallelism_without_experts_is_refused():
    def refused():
        with pytest.raises(UsageError, match="no experts to divide over ep=2"):
            parallelize(dense_model(), MeshConfig(dp_shard=1, ep=2).build())

    run_ranks(2, refused)


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(UsageError, match="_no_split_modules"):
        decoder_layers(torch.nn.Linear(2, 2))
