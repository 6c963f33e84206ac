"""The tokenizer class finds what belongs to a model, in a repository and in a native checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers

from automodel import NeMoAutoTokenizer
from ckpt_tools.core.errors import NotFoundError


def save_tokenizer(root: Path) -> transformers.PreTrainedTokenizerFast:
    words = {word: number for number, word in enumerate(("<unk>", "a", "mesh", "of", "experts"))}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    made.save_pretrained(root)
    (root / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return made


@pytest.mark.parametrize("folder", ["", "hf"])
def test_the_tokenizer_of_a_repository_or_native_checkpoint_is_found(folder: str, tmp_path: Path) -> None:
    expected = save_tokenizer(tmp_path / folder)
    found = NeMoAutoTokenizer.from_pretrained(tmp_path)
    assert found("a mesh of experts").input_ids == expected("a mesh of experts").input_ids == [1, 2, 3, 4]


def test_arguments_reach_transformers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    found = NeMoAutoTokenizer.from_pretrained(tmp_path, padding_side="left", local_files_only=True, revision="main")
    assert found.padding_side == "left"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    with pytest.raises(NotFoundError, match=tmp_path.name):
        NeMoAutoTokenizer.from_pretrained(str(tmp_path))
    with pytest.raises(TypeError, match="from_pretrained"):
        NeMoAutoTokenizer()
