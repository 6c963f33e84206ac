"""A training checkpoint is whole or absent, any DCP reader reads it, and it resumes on any mesh."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor

from automodel.checkpoint import TrainState, latest_checkpoint, load_checkpoint, save_checkpoint, step_directory
from automodel.checkpoint.state import make_optimizer_state, model_state, optimizer_state, rng_state
from automodel.parallel.fsdp import parallelize
from automodel.parallel.mesh import MeshConfig, data_parallel
from automodel.training.optimizer import OptimizerConfig, build_optimizer
from ckpt_tools.core.errors import FormatError, LayoutError, StorageError
from ckpt_tools.engine import files
from tests.automodel.ranks import run_ranks, run_ranks_outcomes
from tests.automodel.tiny import batch, dense_model, moe_model

STATE = TrainState(step=2, tokens=96, seed=7, world_size=1, data_fingerprint="text")
SIDE_FILES = {"config.json": b'{"model_type": "qwen3_moe"}\n', "tokenizer.json": b"{ odd  bytes }"}


def trained(mesh_config=None, steps: int = 2, build=moe_model):
    """A model and optimizer after some steps over the same global batches on any mesh."""
    mesh = (mesh_config or MeshConfig()).build()
    model = build()
    parallelize(model, mesh)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    train(model, optimizer, mesh, range(steps))
    return model, optimizer, mesh


def train(model, optimizer, mesh, steps) -> list[float]:
    rank, size = data_parallel(mesh)
    losses = []
    for step in steps:
        rows = batch(4, seed=step).chunk(size)[rank]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / size
        if mesh is not None:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def state_of(model, optimizer, train_state=STATE) -> dict[str, torch.Tensor]:
    encoded = {"train_state.json": train_state.encode()}
    return {**model_state(model), **optimizer_state(model, optimizer), **encoded, **rng_state()}


def save(directory: Path, model, optimizer, **options) -> None:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    state = TrainState(2, 96, 7, world_size, "text")
    options = {"family": "qwen3_moe", "side_files": SIDE_FILES, "source": {"from": "test"}, **options}
    save_checkpoint(directory, state_of(model, optimizer, state), **options)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, optimizer, _ = trained()
    save(tmp_path / "step-000002", model, optimizer)
    return tmp_path / "step-000002"


def test_plain_dcp_loads_what_was_saved(saved):
    model, optimizer, _ = trained()
    expected = state_of(model, optimizer)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(loaded, storage_reader=FileSystemReader(saved), no_dist=True)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


def test_no_entry_of_a_checkpoint_is_a_pickle(saved):
    metadata = FileSystemReader(saved).read_metadata()
    kinds = {type(entry).__name__ for entry in metadata.state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}


def test_side_files_are_kept_byte_for_byte(saved):
    assert {p.name: p.read_bytes() for p in (saved / "hf").iterdir()} == SIDE_FILES


def test_the_manifest_has_the_digest_of_every_tensor_at_an_aligned_position(saved):
    manifest = json.loads((saved / "ckpt-manifest.json").read_text())
    blobs = [(file, *blob) for file, entries in manifest["blobs"].items() for blob in entries]
    metadata = FileSystemReader(saved).read_metadata()
    assert len(blobs) == len(metadata.storage_data)
    for file, position, length, digest in blobs:
        assert position % 4096 == 0
        data = (saved / file).read_bytes()[position : position + length]
        assert xxhash.xxh3_128_hexdigest(data) == digest


def save_on(mesh_config, directory: Path, steps: int = 2, num_experts: int = 4) -> list[float]:
    """Save after `steps`; the losses of the two steps after it."""
    model, optimizer, mesh = trained(mesh_config, steps, lambda: moe_model(num_experts))
    save(directory, model, optimizer)
    return train(model, optimizer, mesh, range(steps, steps + 2))


def resume_on(mesh_config, directory: Path, num_experts: int = 4) -> list[float]:
    mesh = mesh_config.build()
    model = moe_model(num_experts, seed=99)
    parallelize(model, mesh)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    state = load_checkpoint(directory, model, optimizer)
    return train(model, optimizer, mesh, range(state.step, state.step + 2))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, MeshConfig(dp_shard=2)), (4, MeshConfig(dp_shard=2, ep=2))),
        ((2, MeshConfig(dp_shard=1, ep=2)), (2, MeshConfig(dp_shard=2, ep=1))),
        ((4, MeshConfig(dp_shard=2, ep=2)), (1, MeshConfig())),
        ((1, MeshConfig()), (4, MeshConfig(dp_replicate=2, dp_shard=1, ep=2))),
    ],
    ids=["2 to 4 processes", "EP 2 to EP 1", "4 processes to 1", "1 process to 4"],
)
def test_another_mesh_goes_on_with_the_same_losses(tmp_path, before, after):
    expected = run_ranks(before[0], save_on, before[1], tmp_path / "step-000002")[0]
    for losses in run_ranks(after[0], resume_on, after[1], tmp_path / "step-000002"):
        assert losses == pytest.approx(expected, rel=1e-4)


def test_experts_that_do_not_divide_resume_too(tmp_path):
    directory = tmp_path / "step-000002"
    expected = run_ranks(4, save_on, MeshConfig(dp_shard=1, ep=4), directory, 2, 6)[0]
    assert resume_on(MeshConfig(), directory, 6) == pytest.approx(expected, rel=1e-4)


def test_generators_are_saved_for_every_global_rank(tmp_path):
    directory = tmp_path / "step-000002"

    def draw_after_resume():
        model, optimizer, _ = trained(MeshConfig(dp_shard=1, ep=2), 1)
        torch.manual_seed(100 + dist.get_rank())
        save(directory, model, optimizer)
        expected = torch.rand(3)
        torch.manual_seed(0)
        load_checkpoint(directory, model, optimizer)
        return expected, torch.rand(3)

    ranks = run_ranks(2, draw_after_resume)
    assert all(torch.equal(expected, drawn) for expected, drawn in ranks)
    assert not torch.equal(ranks[0][0], ranks[1][0]), "both ranks have the generator of one"


def test_tied_parameters_are_saved_once(tmp_path):
    model, optimizer, _ = trained(build=lambda: dense_model(tie_word_embeddings=True))
    save(tmp_path / "step-000002", model, optimizer)
    names = FileSystemReader(tmp_path / "step-000002").read_metadata().state_dict_metadata
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_a_full_disk_fails_the_save_on_every_rank_and_leaves_nothing(tmp_path):
    def one_rank_has_no_space():
        model, optimizer, _ = trained(MeshConfig(dp_shard=2), 1)
        if dist.get_rank() == 1:
            real, calls = os.pwrite, []

            def pwrite(fd, data, position):
                calls.append(threading.current_thread())
                if len(calls) > 5:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(fd, data, position)

            files.os.pwrite = pwrite
        with pytest.raises(StorageError, match=r"rank 1.*No space left on device"):
            save(tmp_path / "step-000001", model, optimizer)

    started = time.monotonic()
    run_ranks(2, one_rank_has_no_space)
    assert time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_grow_fails_the_save(tmp_path):
    def limited():
        model, optimizer, _ = trained(steps=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(StorageError, match="File too large"):
            save(tmp_path / "step-000001", model, optimizer)

    run_ranks(1, limited)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("moment", ["fsync", "rename"])
def test_a_kill_during_the_save_leaves_the_older_checkpoint(tmp_path, moment):
    def killed():
        model, optimizer, _ = trained(MeshConfig(dp_shard=2), 1)
        save(tmp_path / "step-000001", model, optimizer)
        if dist.get_rank() == 0:
            setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save(tmp_path / "step-000002", model, optimizer)

    outcomes = run_ranks_outcomes(2, killed)
    assert "exit code -9" in outcomes[0][1]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
    assert not (tmp_path / "step-000002").exists()
    # The next save of the same name is not disturbed by what the kill left.
    model, optimizer, _ = trained()
    save(tmp_path / "step-000002", model, optimizer)
    load_checkpoint(tmp_path / "step-000002", model, optimizer)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-000001", "step-000002"]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    model, optimizer, _ = trained(steps=1)
    for step in (1, 2, 10):
        save(step_directory(tmp_path, step), model, optimizer, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000010"]


def test_another_model_is_refused_with_the_names_that_differ(saved):
    model = moe_model(mlp_only_layers=[1])
    with pytest.raises(LayoutError, match=r"(?s)cannot be resumed.*model\.layers\.1\.mlp\.gate_up_proj"):
        load_checkpoint(saved, model, build_optimizer(model, OptimizerConfig()))


def test_a_checkpoint_without_training_state_is_refused(tmp_path):
    model, optimizer, _ = trained(steps=1)
    options = {"family": "qwen3_moe", "side_files": {}, "source": {}}
    save_checkpoint(tmp_path / "step-000001", model_state(model), **options)
    with pytest.raises(FormatError, match="no training state"):
        load_checkpoint(tmp_path / "step-000001", model, optimizer)


def test_making_optimizer_state_changes_no_parameter():
    model = moe_model()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_optimizer_state(optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(not state["exp_avg"].any() and state["step"] == 0 for state in optimizer.state.values())
    assert all(p.grad is None for p in model.parameters())


def test_a_chunk_that_nothing_describes_is_noticed(tmp_path):
    directory = tmp_path / "step-000002"
    run_ranks(2, save_on, MeshConfig(dp_shard=2), directory)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.layers.1.mlp.experts.down_proj"].chunks.pop()
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    model, optimizer, _ = trained(steps=1)
    with pytest.raises(LayoutError, match=r"(?s)not written by the load.*layers\.1\.mlp\.experts\.down_proj"):
        load_checkpoint(directory, model, optimizer)
