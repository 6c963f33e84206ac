"""Checkpoints that several ranks wrote, by trainers' own code, and Llama's rows judged by logits."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from automodel import NeMoAutoModelForCausalLM
from ckpt_tools import consolidate, verify
from tests.automodel.ranks import run_ranks
from tests.checkpoints import make_repository, tensor_bytes
from tests.dialects import writers
from tests.dialects.test_dialects import PLAIN_LLAMA, config_of
from tests.dialects.writers import State, save, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained_like(source: Path) -> Path:
    """The repository with finite values, which a model can compute with."""
    torch.manual_seed(0)
    for file in source.glob("*.safetensors"):
        state = {name: (torch.randn(t.shape) * 0.2).to(t.dtype) for name, t in load_file(file).items()}
        save_file(state, file, {"format": "pt"})
    return source


def sharded(source: Path) -> torch.nn.Module:
    """The transformers model under FSDP2, over two ranks of this process group."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def save_sharded(source: Path, root: Path) -> None:
    """Under FSDP2, by accelerate's own writer, and model and optimizer in one as torch's tutorial has them."""
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

    model = sharded(source)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()

    # accelerate starts FSDP on accelerators only; its writers take any model that FSDP2 shards.
    os.environ["MASTER_ADDR"] = "localhost"
    PartialState(cpu=True)  # for its logging
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator: Any = SimpleNamespace(num_processes=2, process_index=torch.distributed.get_rank())
    save_fsdp_model(plugin, accelerator, model, str(root / "checkpoint-1"))
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(root / "checkpoint-1"))

    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save({"app": state, "step": torch.tensor(3)}, checkpoint_id=root / "in-one")


def save_experts_over_ranks(source: Path, root: Path) -> None:
    """torchtitan: experts over one axis of the mesh and over rows on the other, everything else over both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    state = {}
    for name, tensor in writers.torchtitan(tensors_of(source), config_of(source)).items():
        places = (Shard(1), Shard(0)) if "inner_experts" in name else (Shard(0), Shard(0))
        state[name] = distribute_tensor(tensor, mesh, places)
    dcp.save({**state, "train_state": {"step": torch.tensor(7)}}, checkpoint_id=root)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A repository, and the folder of what two ranks saved of its model."""
    root = tmp_path_factory.mktemp("trainers")
    source = trained_like(make_repository(root / "source", "qwen3_moe"))
    run_ranks(2, save_sharded, source, root)
    return source, root


def test_accelerates_folders_become_the_repository(saved: tuple[Path, Path], tmp_path: Path) -> None:
    source, root = saved
    report = consolidate(root / "checkpoint-1", tmp_path / "out", like=source)
    assert (report.dialect, report.prefix) == ("transformers", "model.")
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)


def test_model_and_optimizer_in_one_checkpoint_become_the_repository(saved: tuple[Path, Path], tmp_path: Path) -> None:
    source, root = saved
    report = consolidate(root / "in-one", tmp_path / "out", like=source)
    assert (report.dialect, report.prefix) == ("transformers", "app.model.")
    assert report.skipped > report.tensors / 2
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)
    verify(root / "in-one", like=source, against=source)


def test_torchtitans_experts_come_together_from_four_ranks(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "deepseek_v3", num_nextn_predict_layers=0)
    run_ranks(4, save_experts_over_ranks, source, tmp_path / "step-7")
    report = consolidate(tmp_path / "step-7", tmp_path / "out", like=source)
    assert (report.dialect, report.skipped) == ("torchtitan", 1)
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(source)


def test_a_trainers_checkpoint_loads_into_a_model_as_its_repository_does(tmp_path: Path) -> None:
    source = trained_like(make_repository(tmp_path / "source", "deepseek_v3"))
    saved = save(writers.torchtitan(tensors_of(source), config_of(source)), tmp_path / "step-7")
    consolidate(saved, tmp_path / "out", like=source)
    (saved / "config.json").write_bytes((source / "config.json").read_bytes())
    model, expected = (NeMoAutoModelForCausalLM.from_pretrained(place) for place in (saved, tmp_path / "out"))
    assert any("layers.3." in name for name in model.state_dict())
    assert writers.equal(model.state_dict(), expected.state_dict())


def test_llamas_rows_give_the_logits_that_metas_rotary_embedding_gives(tmp_path: Path) -> None:
    source = trained_like(make_repository(tmp_path / "source", "llama", dtype="F32", **PLAIN_LLAMA))
    state = writers.torchtitan(tensors_of(source), config_of(source))
    consolidate(save(state, tmp_path / "saved"), tmp_path / "out", like=source)
    tokens = torch.arange(12)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = metas_llama(state, config_of(source), tokens)
    torch.testing.assert_close(model(tokens[None]).logits[0], expected, atol=1e-4, rtol=1e-4)
    published = tensors_of(source)["model.layers.0.self_attn.q_proj.weight"]
    swapped = {**state, "layers.0.attention.qkv_linear.wq.weight": published}
    assert (metas_llama(swapped, config_of(source), tokens) - expected).abs().max() > 1e-2


def metas_llama(state: State, config: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Llama as Meta wrote it: the rotary embedding multiplies neighbouring rows as complex numbers."""
    heads, kv_heads, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    length = len(tokens)
    frequencies = config["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(length), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) * state[name]

    x = state["tok_embeddings.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer, h = f"layers.{i}.", norm(x, f"layers.{i}.attention_norm.weight")
        q, k, v = (
            (h @ state[f"{layer}attention.qkv_linear.w{n}.weight"].T).unflatten(-1, (-1, head_dim)) for n in "qkv"
        )
        q, k, v = turned(q), *(t.repeat_interleave(heads // kv_heads, 1) for t in (turned(k), v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True
        )
        x = x + attended[0].transpose(0, 1).flatten(1) @ state[f"{layer}attention.wo.weight"].T
        h = norm(x, f"{layer}ffn_norm.weight")
        gate, up = (h @ state[f"{layer}feed_forward.{n}.weight"].T for n in ("w1", "w3"))
        x = x + (torch.nn.functional.silu(gate) * up) @ state[f"{layer}feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ state["lm_head.weight"].T
