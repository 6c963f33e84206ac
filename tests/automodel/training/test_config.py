"""A config is read strictly: what it says is what runs, and a mistake is named before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from automodel.training.config import load_config
from ckpt_tools.core.errors import NotFoundError, UsageError

MINIMAL = """
model: {source: some/model}
data: {files: [text.txt], seq_len: 128}
output_dir: out
steps: 10
global_batch_size: 4
"""


def load(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def test_sections_become_typed_values(tmp_path):
    config = load(
        tmp_path,
        MINIMAL + "optimizer: {lr: 1e-3, betas: [0.9, 0.99]}\nmesh: {dp_shard: 2, ep: 2}\nexport_dir: exported\n",
    )
    # YAML 1.1 reads 1e-3 as text; here it is the number.
    assert config.optimizer.lr == 0.001
    assert config.optimizer.betas == (0.9, 0.99)
    assert (config.mesh.dp_shard, config.mesh.ep) == (2, 2)
    assert config.data.files == (Path("text.txt"),)
    assert config.export_dir == Path("exported")
    assert config.max_grad_norm == 1.0


def test_on_and_off_need_no_quotes(tmp_path):
    config = load(tmp_path, MINIMAL + "checkpoint: {async_save: on}\ncuda_graphs: off\n")
    assert (config.checkpoint.async_save, config.cuda_graphs) == ("on", "off")
    assert load(tmp_path, MINIMAL, "checkpoint.async_save=off").checkpoint.async_save == "off"
    with pytest.raises(UsageError, match="cuda_graphs is 'on', not one of auto, off"):
        load(tmp_path, MINIMAL, "cuda_graphs=on")


def test_overrides_win_over_the_file(tmp_path):
    config = load(
        tmp_path, MINIMAL, "steps=3", "optimizer.lr=0.5", "max_grad_norm=null", "model.backend={experts: torch}"
    )
    assert (config.steps, config.optimizer.lr, config.max_grad_norm) == (3, 0.5, None)
    assert config.model.backend == {"experts": "torch"}


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ("optimiser: {lr: 1.0}", "no key optimiser", "did you mean optimizer?"),
        ("optimizer: {learning_rate: 1.0, weight_decy: 0.1}", "no key optimizer.learning_rate", ""),
        ("optimizer: {weight_decy: 0.1}", "no key optimizer.weight_decy", "did you mean optimizer.weight_decay?"),
        ("optimizer: {lr: fast}", "optimizer.lr is 'fast', not of type float", ""),
        ("optimizer: {betas: [0.9]}", "not a list of 2 values", ""),
        ("schedule: {decay: cosin}", "not one of cosine, linear, constant", "did you mean cosine?"),
        ("seed: 1.5", "seed is 1.5, not of type int", ""),
        ("seed: true", "seed is True, not of type int", ""),
        ("mesh: 4", "mesh is 4, not a section", ""),
        ("micro_batch_size: 0", "has to be 1 or more", ""),
        ("checkpoint: {keep_last: 0}", "keep_last", ""),
    ],
)
def test_mistakes_are_named(tmp_path, change, message, hint):
    with pytest.raises(UsageError) as caught:
        load(tmp_path, MINIMAL + change + "\n")
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_missing_keys_are_listed_together(tmp_path):
    with pytest.raises(UsageError, match="lacks model, data, output_dir, steps, global_batch_size"):
        load(tmp_path, "seed: 1\n")


def test_data_has_one_source(tmp_path):
    with pytest.raises(UsageError, match="exactly one of files and dataset"):
        load(tmp_path, MINIMAL, "data.dataset=wikitext")


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "not a mapping"), ("a: [", "not YAML")])
def test_files_that_are_no_config_are_refused(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        load(tmp_path, text)


def test_overrides_without_a_value_are_refused(tmp_path):
    with pytest.raises(UsageError, match="not an override"):
        load(tmp_path, MINIMAL, "steps")


def test_a_config_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(NotFoundError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
