"""A run from config to export: the same losses on any mesh and after any resume, and outputs that readers load."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

from automodel.checkpoint import latest_checkpoint
from automodel.training import run
from automodel.training.__main__ import main
from automodel.training.termination import Termination
from ckpt_tools.core.errors import CkptError, OutputExistsError, StorageError, UsageError
from tests.automodel.ranks import run_ranks, run_ranks_outcomes
from tests.automodel.tiny import VOCABULARY, moe_config

TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps while the fox runs away again. " * 40


def save_tokenizer(path: Path) -> None:
    characters = sorted(set(pre_tokenizers.ByteLevel.alphabet()))[: VOCABULARY - 1]
    used = sorted({c for word, _ in pre_tokenizers.ByteLevel(False).pre_tokenize_str(TEXT) for c in word})
    vocabulary = dict.fromkeys(["<end>", *used, *characters])
    ids = {token: number for number, token in enumerate(list(vocabulary)[:VOCABULARY])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A tiny Qwen3-MoE as transformers saves it, with a tokenizer, and a text to train on."""
    path = tmp_path_factory.mktemp("source") / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(moe_config(4)).save_pretrained(path)
    save_tokenizer(path)
    (path.parent / "text.txt").write_text(TEXT)
    return path


def write_config(directory: Path, repository: Path, **changes) -> Path:
    document = {
        "model": {"source": str(repository)},
        "data": {"files": [str(repository.parent / "text.txt")], "seq_len": 32},
        "output_dir": str(directory / "out"),
        "steps": 6,
        "global_batch_size": 4,
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def losses(directory: Path) -> list[float]:
    lines = (directory / "out" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1))
    return [s["loss"] for s in steps]


@pytest.fixture(scope="module")
def reference(repository, tmp_path_factory) -> list[float]:
    """Losses of six steps without interruption on one process."""
    directory = tmp_path_factory.mktemp("reference")
    report = run(write_config(directory, repository))
    found = losses(directory)
    assert (report.first_loss, report.last_loss) == (found[0], found[-1])
    return found


def test_the_loss_falls_and_the_run_is_recorded(repository, reference, tmp_path):
    assert reference[-1] < reference[0] - 0.5
    report = run(write_config(tmp_path, repository, steps=2))
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["tokens"] == report.tokens == 2 * 4 * 31
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["lr"] == pytest.approx(5e-3)
    assert first["grad_norm"] > 0
    assert report.checkpoint == str(tmp_path / "out" / "step-000002")


@pytest.mark.parametrize(
    ("world", "mesh"),
    [(2, {"ep": 2}), (2, {"dp_shard": 2}), (4, {"dp_shard": 2, "ep": 2})],
    ids=["ep2", "fsdp2", "fsdp2ep2"],
)
def test_any_mesh_has_the_losses_of_one_process(repository, reference, tmp_path, world, mesh):
    run_ranks(world, run, write_config(tmp_path, repository, mesh=mesh))
    assert losses(tmp_path) == pytest.approx(reference, rel=1e-3)


@pytest.mark.parametrize(
    ("first", "then"),
    [((2, {"ep": 2}), (4, {"dp_shard": 2, "ep": 2})), ((2, {"dp_shard": 2}), (1, {}))],
    ids=["ep 2 to fsdp 2 x ep 2", "2 processes to 1"],
)
def test_a_resume_on_another_mesh_goes_on_as_if_nothing_had_happened(repository, reference, tmp_path, first, then):
    config = write_config(tmp_path, repository, mesh=first[1], checkpoint={"every": 2, "at_end": False})
    # The run is cut after step 5: the step after the last save is taken again.
    run_ranks(first[0], run_until, config, 5)
    assert len(losses(tmp_path)) == 5
    write_config(tmp_path, repository, mesh=then[1])
    reports = run_ranks(then[0], run, config)
    assert all(report.first_step == 5 for report in reports)
    assert losses(tmp_path) == pytest.approx(reference, rel=1e-3)


class Cut(Exception):
    """The machine went away."""


def run_until(config: Path, last_step: int) -> None:
    from automodel.training import loop

    real = loop._Loop._step

    def cut(self, step, **options):
        if step == last_step:
            raise Cut
        return real(self, step, **options)

    loop._Loop._step = cut
    with pytest.raises(Cut):
        run(config)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_saving_beside_training_changes_neither_losses_nor_checkpoints(repository, tmp_path):
    for name, choice in (("waits", "off"), ("beside", "on")):
        checkpoint = {"every": 2, "async_save": choice}
        run_ranks(2, run, write_config(tmp_path / name, repository, mesh={"ep": 2}, checkpoint=checkpoint))
    assert losses(tmp_path / "beside") == losses(tmp_path / "waits")
    for step in (2, 4, 6):
        expected, found = (files_of(tmp_path / name / "out" / f"step-{step:06d}") for name in ("waits", "beside"))
        assert found.keys() == expected.keys()
        assert [name for name, data in expected.items() if found[name] != data] == []


def test_a_save_that_fails_beside_training_ends_the_run_on_every_rank_after_the_same_step(repository, tmp_path):
    def one_rank_has_no_space(config):
        from automodel.training import loop
        from ckpt_tools.engine import files

        def pwrite(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        real = loop._Loop._step

        def slow_after_the_save(self, step, **options):
            if step == 3:
                time.sleep(1)
            return real(self, step, **options)

        loop._Loop._step = slow_after_the_save
        if torch.distributed.get_rank() == 1:
            files.os.pwrite = pwrite
        try:
            run(config)
        except StorageError as error:
            return error.message

    config = write_config(tmp_path, repository, checkpoint={"every": 3, "async_save": "on"})
    told = run_ranks(2, one_rank_has_no_space, config)
    assert told[0] == told[1]
    assert "step-000003 failed on rank 1: cannot write" in told[0]
    assert "No space left on device" in told[0]
    # The save after step 3 fails during step 4, and all hear of it in step 5.
    assert len(losses(tmp_path)) == 5
    assert list((tmp_path / "out").glob("*step*")) == []


def run_terminated(config: Path, rank: int) -> str:
    """Runs until SIGTERM comes to one rank in the third step; what every rank says of its end."""
    from automodel.training import loop

    real = loop._Loop._step

    def terminated(self, step, **options):
        if step == 2 and torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, **options)

    loop._Loop._step = terminated
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert main([str(config)]) == 143
    return errors.getvalue()


def test_sigterm_to_one_process_saves_on_all_and_the_same_command_goes_on(repository, reference, tmp_path):
    config = write_config(tmp_path, repository, mesh={"ep": 2}, checkpoint={"every": 2, "async_save": "on"})
    told = run_ranks(2, run_terminated, config, 1)
    saved = tmp_path / "out" / "step-000004"
    for text in told:
        assert f"error: ended by SIGTERM after step 4\nhint: the same command again resumes from {saved}\n" in text
    assert latest_checkpoint(tmp_path / "out") == saved
    reports = run_ranks(2, run, config)
    assert reports[0].first_step == 5
    assert losses(tmp_path) == pytest.approx(reference, rel=1e-3)


def test_a_run_that_keeps_no_checkpoints_ends_at_sigterm_without_one(repository, tmp_path):
    config = write_config(tmp_path, repository, checkpoint={"at_end": False})
    (told,) = run_ranks(1, run_terminated, config, 0)
    assert told.endswith("error: ended by SIGTERM after step 4\n")
    assert list((tmp_path / "out").glob("step-*")) == []


def test_a_signal_that_came_too_late_to_be_noticed_ends_the_process():
    def ends_too_soon():
        with Termination() as termination:
            os.kill(os.getpid(), signal.SIGTERM)
            assert termination.requested

    ((_, error),) = run_ranks_outcomes(1, ends_too_soon)
    assert error == "died with exit code -15"


def test_a_program_that_handles_sigterm_keeps_its_handler():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    try:
        with Termination() as termination:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (seen, termination.requested) == ([True], False)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_resumed_run_outlives_the_checkpoint_that_it_began_from(repository, tmp_path):
    config = write_config(tmp_path, repository, steps=1, checkpoint={"every": 1, "keep_last": 1})
    run(config)
    run(config, ["steps=4"])
    assert [path.name for path in (tmp_path / "out").glob("step-*")] == ["step-000004"]


def test_the_export_is_a_repository_that_transformers_loads(repository, tmp_path):
    config = write_config(tmp_path, repository, mesh={"ep": 2}, export_dir=str(tmp_path / "exported"))
    run_ranks(2, run, config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids = tokenizer(TEXT[:60], return_tensors="pt").input_ids
    with torch.no_grad():
        trained = model(ids, labels=ids).loss
        untrained = AutoModelForCausalLM.from_pretrained(repository, dtype=torch.float32)(ids, labels=ids).loss
    assert trained < untrained - 0.3


def test_a_resumed_run_exports_all_files_of_the_source(repository, tmp_path):
    run(write_config(tmp_path, repository, steps=1))
    run(write_config(tmp_path, repository, steps=2, export_dir=str(tmp_path / "exported")))
    names = {path.name for path in repository.iterdir()}
    assert names <= {path.name for path in (tmp_path / "exported").iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "exported" / name).read_bytes() == (repository / name).read_bytes()


def test_a_checkpoint_is_a_source_for_another_run(repository, reference, tmp_path):
    run(write_config(tmp_path / "a", repository))
    later = write_config(tmp_path / "b", tmp_path / "a" / "out" / "step-000006", steps=1)
    document = yaml.safe_load(later.read_text())
    document["data"]["files"] = [str(repository.parent / "text.txt")]
    later.write_text(yaml.safe_dump(document))
    run(later)
    assert losses(tmp_path / "b")[0] < reference[-2]


def test_mixed_precision_trains(repository, reference, tmp_path):
    model = {"source": str(repository), "compute_dtype": "bfloat16", "reduce_dtype": "float32"}
    run_ranks(2, run, write_config(tmp_path, repository, model=model, mesh={"ep": 2}))
    assert losses(tmp_path) == pytest.approx(reference, rel=0.1)


def test_a_model_without_a_native_form_trains_on_a_mesh(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source" / "model")
    save_tokenizer(tmp_path / "source" / "model")
    (tmp_path / "source" / "text.txt").write_text(TEXT)
    exported = tmp_path / "exported"
    run_ranks(2, run, write_config(tmp_path, tmp_path / "source" / "model", export_dir=str(exported)))
    found = losses(tmp_path)
    assert found[-1] < found[0]
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    model = AutoModelForCausalLM.from_pretrained(exported)
    ids = AutoTokenizer.from_pretrained(exported)(TEXT[:60], return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < found[0] - 0.3


def test_selective_checkpointing_is_refused_where_transformers_runs(tmp_path):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    model = {"source": str(tmp_path / "model"), "activation_checkpointing": "selective"}
    written = write_config(tmp_path, tmp_path / "model", model=model)
    with pytest.raises(UsageError, match="GPT2LMHeadModel has no selective activation checkpointing"):
        run(written)


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_activation_checkpointing_changes_no_loss(repository, reference, tmp_path, checkpointing):
    model = {"source": str(repository), "activation_checkpointing": checkpointing}
    run_ranks(2, run, write_config(tmp_path, repository, model=model, steps=3, mesh={"ep": 2}))
    # The schedule reaches its end earlier, so only steps with the same learning rate compare.
    assert losses(tmp_path)[:3] == pytest.approx(reference[:3], rel=1e-3)


def test_a_fresh_start_refuses_a_directory_with_checkpoints(repository, tmp_path):
    config = write_config(tmp_path, repository, steps=1, checkpoint={"resume": "none"})
    run(config)
    with pytest.raises(OutputExistsError, match="checkpoints of an earlier run"):
        run(config)


def test_an_export_is_never_written_over_something(repository, tmp_path):
    (tmp_path / "exported").mkdir()
    with pytest.raises(OutputExistsError, match="exported exists"):
        run(write_config(tmp_path, repository, export_dir=str(tmp_path / "exported")))
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_done_takes_no_step(repository, tmp_path):
    config = write_config(tmp_path, repository, steps=2)
    run(config)
    report = run(config)
    assert (report.first_step, report.steps, report.first_loss) == (3, 2, None)
    with pytest.raises(UsageError, match="at step 2, beyond steps=1"):
        run(config, ["steps=1"])


def test_an_error_of_one_rank_ends_all(repository, tmp_path):
    def missing_on_rank_1(config):
        if torch.distributed.get_rank() == 1:
            (changed := config.with_name("rank1.yaml")).write_text(config.read_text().replace("text.txt", "none.txt"))
            config = changed
        run(config)

    outcomes = run_ranks_outcomes(2, missing_on_rank_1, write_config(tmp_path, repository))
    assert all("none.txt" in error for _, error in outcomes)
    assert CkptError.__name__ in outcomes[0][1]


def test_torchrun_starts_a_run_and_an_error_is_one_sentence(repository, tmp_path):
    config = write_config(tmp_path, repository, steps=2, mesh={"ep": 2})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, "-m", "automodel.training", str(config), "--set", "seed=3"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 2/2") == 1, "both ranks speak"
    assert "trained NeMoQwen3MoeForCausalLM on ep 2" in done.stderr
    failed = subprocess.run(
        [sys.executable, "-m", "automodel.training", str(config), "--set", "stepps=3"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert failed.returncode == UsageError.exit_code
    assert "error: the config has no key stepps\nhint: did you mean steps?" in failed.stderr
    assert "Traceback" not in failed.stderr
