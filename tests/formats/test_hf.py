"""Hugging Face repositories: what is opened, what is refused, what is planned. Judged by safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_tools.core.errors import FormatError, NotFoundError, UsageError
from ckpt_tools.formats.hf import INDEX, open_repository, plan_repository
from tests.formats.build import dtype_of, materialize, read_back

TENSORS = {
    "model.embed_tokens.weight": torch.randn(8, 4).to(torch.bfloat16),
    "model.layers.0.mlp.weight": torch.randn(4, 4),
    "model.layers.0.steps": torch.tensor(7),
    "model.norm.weight": torch.randn(4),
}


def sharded(root: Path) -> Path:
    names = list(TENSORS)
    root.mkdir(exist_ok=True)
    files = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, members in files.items():
        save_file({name: TENSORS[name] for name in members}, root / file, metadata={"format": "pt"})
    weight_map = {name: file for file, members in files.items() for name in members}
    (root / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    (root / "config.json").write_text('{"model_type": "tiny"}')
    return root


def remap(root: Path, **changes: str | None) -> None:
    index = json.loads((root / INDEX).read_text())
    for name, file in changes.items():
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file
    (root / INDEX).write_text(json.dumps(index))


def test_a_sharded_repository_is_opened_with_every_tensor_where_it_lies(tmp_path: Path) -> None:
    repository = open_repository(sharded(tmp_path))
    assert repository.config == {"model_type": "tiny"}
    assert repository.store.kind == "safetensors"
    assert repository.store.metadata == {"format": "pt"}
    assert repository.store.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read_back(repository.store, name), tensor)
    assert repository.store.files == {p.name: p.stat().st_size for p in tmp_path.glob("*.safetensors")}


@pytest.mark.parametrize("file", ["model.safetensors", "weights.safetensors"])
def test_a_single_file_needs_no_index(tmp_path: Path, file: str) -> None:
    save_file(TENSORS, tmp_path / file)
    assert open_repository(tmp_path).store.tensors.keys() == TENSORS.keys()
    assert open_repository(tmp_path).config == {}


def test_side_files_are_what_makes_the_model_usable_and_nothing_else(tmp_path: Path) -> None:
    sharded(tmp_path)
    kept = [
        "LICENSE",
        "README.md",
        "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "modeling_custom.py",
        "tokenizer.json",
        "tokenizer.model",
    ]
    left = [
        ".gitattributes",
        ".cache/huggingface/x.json",
        "ckpt-manifest.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "training_args.bin",
        "model.GGUF",
        "original/params.json",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "onnx/notes.json",
        "checkpoint-10/optimizer.pt",
        "checkpoint-10/trainer_state.json",
    ]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text("x")
    (tmp_path / "linked").symlink_to(outside)
    (tmp_path / "vocab.json").symlink_to(tmp_path / "original/params.json")
    assert list(open_repository(tmp_path).side_files) == sorted([*kept, "vocab.json"])
    (tmp_path / "added_tokens.json").symlink_to(outside / "secret.json")
    with pytest.raises(FormatError, match=r"added_tokens\.json is a link to .*secret\.json, outside of the checkpoint"):
        open_repository(tmp_path)


def test_everything_wrong_is_listed_at_once(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"extra": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    remap(tmp_path, ghost="model-00001-of-00002.safetensors", **{"model.layers.0.mlp.weight": None})
    with pytest.raises(FormatError) as caught:
        open_repository(tmp_path)
    message = str(caught.value)
    assert "4 faults" in message
    assert "adapter.safetensors: the index does not list this file" in message
    assert "model-00002-of-00002.safetensors: the index lists this file, which does not exist" in message
    assert "ghost: the index places it in model-00001-of-00002.safetensors, which does not hold it" in message
    assert "model.layers.0.mlp.weight: model-00001-of-00002.safetensors holds it and the index does not list" in message


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    members = [*list(TENSORS)[2:], "model.embed_tokens.weight"]
    save_file({name: TENSORS[name] for name in members}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(FormatError, match=r"model-00002-of-00002\.safetensors holds it and the index places it in"):
        open_repository(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors"]
)
def test_an_index_cannot_name_a_file_outside_the_repository(tmp_path: Path, name: str) -> None:
    save_file({"stolen": torch.zeros(1)}, tmp_path / "x.safetensors")
    root = sharded(tmp_path / "repository")
    remap(root, stolen=name)
    with pytest.raises(FormatError, match="not a plain relative path"):
        open_repository(root)


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        ("[]", "not an object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 1}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "not the name of a safetensors file"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' twice"),
        ('{"weight_map": ', "not valid JSON"),
    ],
)
def test_a_malformed_index_is_refused(tmp_path: Path, index: str, fault: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(FormatError, match=fault):
        open_repository(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="only as pickles"):
        open_repository(tmp_path)


def test_several_files_without_an_index_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no \*.safetensors"):
        open_repository(tmp_path)
    with pytest.raises(NotFoundError, match="not a directory"):
        open_repository(tmp_path / "none")
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file(TENSORS, tmp_path / "again.safetensors")
    with pytest.raises(FormatError, match=r"2 safetensors files and no model\.safetensors\.index\.json"):
        open_repository(tmp_path)


def test_planned_shards_are_filled_in_order_and_read_by_the_reference_library(tmp_path: Path) -> None:
    described = {name: (dtype_of(tensor), tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    target = plan_repository(described, max_shard_size=80)
    materialize(target, tmp_path, TENSORS)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 64 + 64 + 8 + 16}
    assert list(index["weight_map"].items()) == [
        ("model.embed_tokens.weight", "model-00001-of-00003.safetensors"),
        ("model.layers.0.mlp.weight", "model-00002-of-00003.safetensors"),
        ("model.layers.0.steps", "model-00002-of-00003.safetensors"),
        ("model.norm.weight", "model-00003-of-00003.safetensors"),
    ]
    store = open_repository(tmp_path).store
    assert store.metadata == {"format": "pt"}
    for name, tensor in TENSORS.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)
        assert store.tensors[name] == target.store.tensors[name]


def test_a_plan_that_fits_one_file_has_no_index(tmp_path: Path) -> None:
    described = {name: (dtype_of(tensor), tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    target = plan_repository(described, max_shard_size=1 << 30, metadata={"format": "pt", "by": "test"})
    assert list(target.store.files) == ["model.safetensors"]
    assert not target.documents
    materialize(target, tmp_path, TENSORS)
    assert open_repository(tmp_path).store.metadata == {"format": "pt", "by": "test"}
    with pytest.raises(UsageError, match="must be positive"):
        plan_repository(described, max_shard_size=0)
