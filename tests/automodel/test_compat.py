"""The differences between transformers versions, as the rest of the package sees them."""

from __future__ import annotations

import pytest
import torch
import transformers

from automodel import compat
from ckpt_tools.core.errors import UsageError
from tests.automodel.helpers import SIZES, rope


def test_the_major_version_is_the_installed_one() -> None:
    assert transformers.__version__.startswith("5.") == compat.TRANSFORMERS_5


@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "expected"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (None, torch.bfloat16, torch.bfloat16),
        ("auto", None, "auto"),
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_either_spelling_of_the_dtype_is_taken(dtype: object, torch_dtype: object, expected: object) -> None:
    assert compat.merge_dtype(dtype, torch_dtype) == expected


def test_without_a_dtype_the_installed_version_decides() -> None:
    assert compat.merge_dtype(None, None) == ("auto" if compat.TRANSFORMERS_5 else torch.float32)


def test_two_different_dtypes_are_refused() -> None:
    with pytest.raises(UsageError, match="disagree"):
        compat.merge_dtype(torch.bfloat16, torch.float32)


def test_rope_type_and_base_are_read_in_the_installed_spelling() -> None:
    config = transformers.LlamaConfig(**SIZES, **rope(123.0))
    assert compat.rope_type(config) == "default"
    frequencies, factor = compat.rope_frequencies(config, torch.device("cpu"))
    assert factor == 1.0
    assert frequencies[-1].item() == pytest.approx(123.0 ** (-6 / 8))


def test_the_dtype_of_a_config_is_a_torch_dtype() -> None:
    config = transformers.LlamaConfig(**SIZES)
    config.dtype = "bfloat16"
    assert compat.config_dtype(config) == torch.bfloat16
