"""Parameters reach a model from a checkpoint's files, wherever its pieces lie, and none is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2Config

from automodel.parallel import materialize
from automodel.parallel.fsdp import parallelize
from automodel.parallel.materialize import allocate, load_parameters
from automodel.parallel.mesh import MeshConfig
from ckpt_tools.core.errors import CkptError, LayoutError
from ckpt_tools.engine.checkpoint import open_checkpoint
from tests.automodel.ranks import run_ranks, run_ranks_outcomes
from tests.automodel.tiny import batch, moe_config, moe_model


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A Qwen3-MoE repository saved by transformers."""
    torch.manual_seed(3)
    path = tmp_path / "repository"
    AutoModelForCausalLM.from_config(moe_config(6)).save_pretrained(path)
    return path


def meta_model(num_experts: int = 6, **changes):
    with torch.device("meta"):
        return moe_model(num_experts, **changes)


def loaded(repository: Path, mesh_config: MeshConfig):
    """Full parameters and logits of a model that was loaded on a mesh."""
    model = meta_model()
    parallelize(model, mesh_config.build())
    load_parameters(model, open_checkpoint(repository), staging_bytes=1000)
    model.eval()
    with torch.no_grad():
        logits = model(batch(2)).logits
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    return full, logits


def test_one_process_computes_what_transformers_does(repository):
    _, logits = loaded(repository, MeshConfig())
    reference = AutoModelForCausalLM.from_pretrained(repository, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, reference(batch(2)).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(dp_shard=4), MeshConfig(dp_shard=1, ep=4), MeshConfig(dp_shard=2, ep=2), MeshConfig(2, 1, 2)],
    ids=["fsdp4", "ep4", "fsdp2ep2", "replicas2ep2"],
)
def test_every_mesh_holds_the_same_values(repository, mesh):
    single, logits = loaded(repository, MeshConfig())
    for full, sharded_logits in run_ranks(4, loaded, repository, mesh):
        assert full.keys() == single.keys()
        for name, tensor in full.items():
            assert torch.equal(tensor, single[name]), name
        torch.testing.assert_close(sharded_logits, logits, rtol=1e-5, atol=1e-6)


def test_a_load_that_misses_a_parameter_is_noticed(repository, monkeypatch):
    real = materialize.load_boxes

    def forgetful(checkpoint, boxes, **options):
        real(checkpoint, [box for box in boxes if "experts.down_proj" not in box.name], **options)

    monkeypatch.setattr(materialize, "load_boxes", forgetful)
    with pytest.raises(LayoutError, match=r"(?s)not written.*experts\.down_proj"):
        load_parameters(meta_model(), open_checkpoint(repository))


def test_a_model_of_other_names_is_refused(repository):
    with pytest.raises(LayoutError, match="does not fit the model"):
        load_parameters(meta_model(mlp_only_layers=[0]), open_checkpoint(repository))


def test_an_error_on_one_rank_is_raised_on_all(repository):
    def one_rank_fails():
        if torch.distributed.get_rank() == 1:
            materialize.load_boxes = lambda *_, **__: (_ for _ in ()).throw(OSError("the disk of rank 1 is gone"))
        loaded(repository, MeshConfig(dp_shard=2))

    outcomes = run_ranks_outcomes(2, one_rank_fails)
    assert all("the disk of rank 1 is gone" in error for _, error in outcomes)
    assert CkptError.__name__ in outcomes[0][1]


def test_tied_parameters_stay_tied():
    model = meta_model(tie_word_embeddings=True)
    allocate(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_rotary_frequencies_are_recomputed():
    model = meta_model()
    allocate(model)
    assert torch.equal(model.model.rotary_emb.inv_freq, moe_model(6).model.rotary_emb.inv_freq)


def test_a_plain_transformers_model_loads_by_its_own_names(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config)
    tensors = {n: t.contiguous() for n, t in original.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    load_parameters(model, open_checkpoint(tmp_path))
    with torch.no_grad():
        assert torch.equal(model.eval()(batch(1)).logits, original.eval()(batch(1)).logits)
