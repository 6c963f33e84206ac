"""Steps as CUDA graphs, with FSDP's collectives and the exchange between experts in them, against steps without.

Skipped without CUDA; with one GPU, only what one can show. `python -m pytest tests/gpu/test_step_graph.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(gpus < 1, reason="needs a CUDA GPU")

STEPS, ROWS, LENGTH = 8, 2, 512
CASES = {
    "one micro-batch": {"micro_batches": 1},
    "three micro-batches": {"micro_batches": 3},
    "gradients reduced once": {"micro_batches": 3, "sync_last": True},
    "in FP32, computed in BF16": {"micro_batches": 2, "master": True},
    "selective checkpointing": {"micro_batches": 1, "selective": True},
    "selective checkpointing, compiled": {"micro_batches": 1, "selective": True, "layers": "compiled"},
}


def learn(
    _rank: int, _world: int, mesh_sizes: dict[str, int], case: dict[str, Any]
) -> tuple[list[float], list[float], int]:
    """Losses without graphs, with them, and how many graphs there were."""
    plain, _ = losses(mesh_sizes, **case | {"selective": False}, graphed=False)
    return plain, *losses(mesh_sizes, **case, graphed=True)


def losses(
    mesh_sizes: dict[str, int],
    *,
    micro_batches: int,
    graphed: bool,
    sync_last: bool = False,
    master: bool = False,
    selective: bool = False,
    layers: str = "eager",
) -> tuple[list[float], int]:
    import transformers

    from automodel import MeshConfig
    from automodel.backends import Backend
    from automodel.models import NATIVE_MODELS
    from automodel.parallel.fsdp import parallelize
    from automodel.parallel.mesh import MixedPrecision, ParallelMesh
    from automodel.training.data import Batch
    from automodel.training.optimizer import OptimizerConfig, build_optimizer
    from automodel.training.step import step_graph, train_step
    from tests.gpu.test_cuda import SIZES

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES)
    model = NATIVE_MODELS[config.model_type](config, backend=Backend.parse({"layers": layers})).cuda()
    model = model.float() if master else model.bfloat16()
    precision = MixedPrecision(torch.bfloat16, torch.float32) if master else None
    mesh = ParallelMesh.of(MeshConfig(**mesh_sizes).build("cuda"), precision)
    parallelize(model, mesh)
    model.train()
    model.selective_checkpointing_enable(selective)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3))
    graph = step_graph(model, micro_batches, sync_last=sync_last) if graphed else None
    measured = []
    for step in range(STEPS):
        # A step from graphs waits for what it measured, and for nothing else: the next one is launched meanwhile.
        torch.cuda.set_sync_debug_mode("error" if graph is not None and graph.captured == micro_batches else "default")
        generator = torch.Generator().manual_seed(10 * step + mesh.data_rank)
        batches = []
        for _ in range(micro_batches):
            ids = torch.empty(ROWS, LENGTH).exponential_(3.0, generator=generator).mul(100).long().clamp(max=511)
            batches.append(Batch(ids, torch.arange(LENGTH).expand_as(ids), ids).to(torch.device("cuda")))
        result = train_step(model, optimizer, batches, mesh, max_grad_norm=1.0, sync_last=sync_last, graph=graph)
        measured.append(result.loss)
    torch.cuda.set_sync_debug_mode("default")
    captured = graph.captured if graph is not None else 0
    if graph is not None:
        graph.close()
    return measured, captured


@pytest.mark.parametrize(
    ("world", "mesh_sizes"),
    [(1, {}), (2, {"dp_shard": 2}), (2, {"dp_shard": 1, "ep": 2}), (4, {"dp_shard": 2, "ep": 2})],
    ids=["one GPU", "fsdp 2", "ep 2", "fsdp 2 x ep 2"],
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps_from_graphs_learn_the_same(
    tmp_path: Path, world: int, mesh_sizes: dict[str, int], case: dict[str, Any]
) -> None:
    from tests.gpu.test_dispatch import on_gpus

    if gpus < world:
        pytest.skip(f"needs {world} GPUs")
    for plain, graphed, captured in on_gpus(tmp_path, learn, world, mesh_sizes, case):
        assert captured == case["micro_batches"]
        assert graphed == pytest.approx(plain, rel=2e-3)
        assert graphed[-1] < graphed[0]
