"""The memory estimate, against what was measured on GPUs and what autograd keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from automodel.compat import TRANSFORMERS_5
from automodel.kernels import cross_entropy
from automodel.memory import Step, activations, estimate, states
from automodel.memory.activations import Activations
from automodel.memory.sizes import FAMILIES, Sizes
from automodel.parallel import fsdp
from ckpt_tools.core.errors import UsageError
from ckpt_tools.engine.sharding import ShardingMesh
from ckpt_tools.families import layout_for

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
IMPLEMENTATIONS = {
    "ours": "native",
    "transformers": "transformers",
    "transformers-compiled": "transformers-compiled",
    "transformers-flex-compiled": "transformers-compiled",
}
ALONE = ShardingMesh()
ODD_SIZES = {
    "model_type": "qwen3_moe",
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 64,
    "moe_intermediate_size": 40,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 14,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}


def measured() -> Iterator[Any]:
    """Every row of the training benchmark's results that there is a formula for."""
    for path in sorted(RESULTS.glob("training-*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        made = document["configuration"]
        for row in document["rows"]:
            kind = IMPLEMENTATIONS.get(row["implementation"])
            # transformers' attention of GPT-OSS keeps all scores unless it is compiled.
            family = made["config"]["model_type"]
            if (
                "error" in row
                or kind is None
                or family not in FAMILIES
                or (family, kind) == ("gpt_oss", "transformers")
            ):
                continue
            step = Step(row["micro_batch"], made["sequence"], row.get("checkpointing") or False, kind)
            mesh = ShardingMesh(made["gpus"] // row.get("ep", made["gpus"]), row.get("ep", made["gpus"]))
            name = f"{path.stem} {row['implementation']} {step.batch}"
            # What `training_memory.PEERS_KEEP` of the benchmarks says; ours keep what `parallelize` does.
            kept = {} if kind == "native" else {"keeps": 40 << 30}
            yield pytest.param(made["config"], mesh, step, kept, row["peak_gib"], id=name)


@pytest.mark.parametrize(("config", "mesh", "step", "kept", "gib"), list(measured()))
def test_the_peak_is_near_the_one_measured(
    config: dict[str, Any], mesh: ShardingMesh, step: Step, kept: dict[str, int], gib: float
) -> None:
    assert estimate(config, mesh, step, **kept).peak / 2**30 == pytest.approx(gib, rel=0.1)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="the formulas are those of transformers 5")
@pytest.mark.parametrize("sparse", [True, False], ids=["experts", "dense"])
def test_transformers_keeps_of_a_layer_what_the_formula_says(sparse: bool) -> None:
    config = {**ODD_SIZES, "mlp_only_layers": [] if sparse else [0, 1, 2]}
    step = Step(1, 64, implementation="transformers")
    layer = kept_by_autograd(config, 3, 64) - kept_by_autograd(config, 2, 64)
    assert Activations(Sizes.of(config, step, 2), ALONE, step.implementation, False).kept(0) == pytest.approx(
        layer, rel=0.01
    )


def kept_by_autograd(config: dict[str, Any], layers: int, tokens: int) -> int:
    """Bytes of the memory that the forward pass of a BF16 model saves, without parameters."""
    fields = {**config, "num_hidden_layers": layers}
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16, experts_implementation="grouped_mm").train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, config["vocab_size"], (1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids, labels=ids, use_cache=False)
    del output
    return sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in parameters)


@pytest.mark.parametrize("mesh", [ShardingMesh(1, 4), ShardingMesh(2, 2), ShardingMesh(4, 1)], ids=str)
def test_parameters_are_what_the_mesh_cuts_them_into(mesh: ShardingMesh) -> None:
    config = {**ODD_SIZES, "num_experts": 16, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 64}
    layout = layout_for(config)
    assert layout is not None
    elements = sum(leaf.numel for leaf in layout.leaves.values())
    memory = estimate(config, mesh, Step(1, 8), optimizer="adamw-fp32")
    assert memory.parameters == memory.gradients == pytest.approx(2 * elements / 4, rel=0.001)
    assert memory.optimizer == 4 * memory.parameters


def test_checkpointing_and_division_save_memory() -> None:
    step = Step(4, 4096)
    again = Step(4, 4096, checkpointing=True)
    assert estimate(ODD_SIZES, ALONE, again).activations == 2 * 4 * 4096 * 96 * 2
    assert estimate(ODD_SIZES, ALONE, again).peak < estimate(ODD_SIZES, ALONE, step).peak
    assert estimate(ODD_SIZES, ShardingMesh(1, 2), step).parameters < estimate(ODD_SIZES, ALONE, step).parameters


def test_the_formulas_know_the_constants_of_the_code() -> None:
    symmetric = (ROOT / "automodel" / "moe" / "symmetric.py").read_text(encoding="utf-8")
    assert f"_KEPT_LOAD = {activations.KEPT_LOAD}\n" in symmetric
    assert activations.LOSS_CHUNK_BYTES == cross_entropy._CHUNK_BYTES
    assert states.KEPT_GATHERED_BYTES == fsdp._KEPT_BYTES


def test_what_has_no_formula_is_refused() -> None:
    with pytest.raises(UsageError, match="memory is not estimated for nemotron_h"):
        estimate({**ODD_SIZES, "model_type": "nemotron_h"}, ALONE, Step(1, 8))
    with pytest.raises(UsageError, match="attention keeps all scores"):
        estimate({**ODD_SIZES, "model_type": "gpt_oss"}, ALONE, Step(1, 8, implementation="transformers"))
    with pytest.raises(UsageError, match="no optimizer 'adamw-bf61'") as refused:
        estimate(ODD_SIZES, ALONE, Step(1, 8), optimizer="adamw-bf61")
    assert refused.value.hint == "did you mean adamw-bf16?"


def test_estimating_needs_no_torch() -> None:
    check = "import sys, automodel.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
