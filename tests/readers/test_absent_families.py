"""Families that a reader has no class for, as `ckpt consolidate --for` says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from ckpt_tools.families.readers import LIMITS
from tests.readers import matrix

ABSENT = ("nemotron_h",)
"""Model types that transformers 4 does not know."""

pytestmark = pytest.mark.readers


@pytest.mark.parametrize("model_type", ABSENT)
def test_transformers_4_has_no_class_for_it(model_type: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if not {"transformers4", "all"} & set(pytestconfig.getoption("--readers")):
        pytest.skip("transformers 4 is not asked")
    (limit,) = [limit for limit in LIMITS if limit.model_types == (model_type,) and limit.reader == "transformers4"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    code = f"import transformers; transformers.AutoConfig.from_pretrained({str(tmp_path)!r})"
    command = [str(matrix.interpreter("transformers4")), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert limit.error in done.stderr
