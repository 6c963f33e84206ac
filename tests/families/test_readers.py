"""What `consolidate --for` knows of readers: each limit is shown by a checkpoint of the reader matrix, and refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert, verify
from ckpt_tools.core.errors import UsageError
from ckpt_tools.families.readers import LIMITS, READERS, Limit, config_for, limits, parse_readers
from tests.checkpoints import make_repository, tensor_bytes
from tests.readers import matrix
from tests.readers.cases import CASES, FORMS
from tests.readers.cases import LIMITS as LIMITS_OF_THIS_MACHINE


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: f"{limit.reader}-{limit.reason}")
def test_every_limit_is_shown_by_a_checkpoint_of_the_matrix(limit: Limit) -> None:
    shown = [case for case, config in CASES.items() if limit in limits(config, READERS, FORMS.get(case, ""))]
    assert any(matrix.Cell(limit.reader, "transformers5", case).refusal == limit for case in shown)


def test_a_limit_is_written_once() -> None:
    for reader, case in LIMITS_OF_THIS_MACHINE:
        assert limits(CASES[case], (reader,), FORMS.get(case, "")) == []


def test_checkpoints_that_every_reader_takes_are_left_alone() -> None:
    config = CASES["qwen3_moe"]
    assert config_for(config, READERS) is not None
    assert config_for(config, READERS) == config


def test_all_reasons_of_a_refusal_are_given() -> None:
    with pytest.raises(UsageError) as refusal:
        config_for(CASES["qwen3_moe-dense_layers"], ("vllm", "sglang"))
    assert "sglang: SGLang ignores `mlp_only_layers` and `decoder_sparse_step`" in refusal.value.message
    assert "vllm" not in refusal.value.message


def test_a_limit_of_one_form_does_not_concern_another() -> None:
    config = CASES["qwen3_moe-fp8-narrow"]
    assert config_for(config, READERS) == config
    with pytest.raises(UsageError, match="whole blocks of 128 rows"):
        config_for(config, READERS, "fp8")


@pytest.mark.parametrize(
    ("text", "hint"), [("vlm", "did you mean vllm?"), ("vllm,transformers", "did you mean transformers"), (",", "are")]
)
def test_an_unknown_reader_is_a_usage_error_with_the_nearest_name(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_readers(text)
    assert hint in (error.value.hint or "")


def test_readers_are_named_once_in_any_order_and_spacing() -> None:
    assert parse_readers("sglang, vllm,sglang") == ("sglang", "vllm")


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_the_head_is_untied_for_a_reader_that_ignores_the_tie(tmp_path: Path, quantize: str | None) -> None:
    source = make_repository(
        tmp_path / "source", "qwen3_moe", tie_word_embeddings=True, mlp_only_layers=[], head_dim=64
    )
    native, out, plain = tmp_path / "native", tmp_path / "out", tmp_path / "plain"
    convert(source, native)
    consolidate(native, out, readers="vllm,sglang", quantize=quantize)
    tensors = tensor_bytes(out)
    assert tensors["lm_head.weight"] == tensors["model.embed_tokens.weight"]
    assert re.search(r'"tie_word_embeddings": false', (out / "config.json").read_text())
    verify(out)
    if quantize is None:
        verify(out, against=native)
        verify(source, against=out)
    consolidate(native, plain, readers="vllm")
    assert "lm_head.weight" not in tensor_bytes(plain)


def test_names_that_are_to_be_kept_are_not_changed_for_a_reader(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3_moe", tie_word_embeddings=True, mlp_only_layers=[])
    with pytest.raises(UsageError, match="keeps all names"):
        consolidate(source, tmp_path / "out", readers="sglang", family="identity")


def test_nothing_is_written_when_a_reader_cannot_be_served(tmp_path: Path) -> None:
    source = make_repository(tmp_path / "source", "qwen3_moe")
    convert(source, tmp_path / "native")
    with pytest.raises(UsageError, match="mlp_only_layers"):
        consolidate(tmp_path / "native", tmp_path / "out", readers="sglang")
    assert not (tmp_path / "out").exists()
