"""The README's support table says what the measured matrix says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readers.matrix import ALL_CASES

SCRIPT = Path(__file__).parents[1] / "scripts" / "support_table.py"
spec = importlib.util.spec_from_file_location("support_table", SCRIPT)
support_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(support_table)


def cell(reader: str, **changes: object) -> dict[str, object]:
    plain = {"reader": reader, "version": "1.2", "writer": "transformers5", "case": "qwen3_moe", "limit": None}
    return plain | {"max_abs_logprob_difference": 3.2e-6, "passed": True, "proof": "logits", "note": None} | changes


def test_every_case_of_the_matrix_has_a_row_and_every_row_a_case() -> None:
    assert set(support_table.CASES) == set(ALL_CASES)


def test_a_cell_shows_the_worst_difference_of_both_writers() -> None:
    cells = [cell("transformers4"), cell("transformers4", writer="transformers4", max_abs_logprob_difference=7.0e-6)]
    assert "| Qwen3-MoE | ✓ 7e-06 |" in support_table.render({"cells": cells})


def test_no_difference_at_all_is_called_exact() -> None:
    assert "| Qwen3-MoE | ✓ exact |" in support_table.render({"cells": [cell("vllm", max_abs_logprob_difference=0.0)]})


def test_one_failure_is_never_hidden_by_a_success() -> None:
    cells = [cell("transformers4"), cell("transformers4", writer="transformers4", passed=False)]
    assert "| Qwen3-MoE | **differs** |" in support_table.render({"cells": cells})


def test_a_limit_is_footnoted_and_an_unrun_cell_says_so() -> None:
    table = support_table.render({"cells": [cell("sglang", passed=False, limit="SGLang ignores it")]})
    assert "| Qwen3-MoE | reader's limit (1) |" in table
    assert "1. SGLang ignores it, in the stock checkpoint too." in table
    assert "| Mixtral | not run |" in table


def test_a_cell_whose_files_only_were_compared_says_so_and_why() -> None:
    files = {"proof": "values", "version": None, "max_abs_logprob_difference": None}
    table = support_table.render({"cells": [cell("vllm"), cell("vllm", case="mixtral", note="no kernel", **files)]})
    assert "| checkpoint | vLLM 1.2 |" in table
    assert "| Mixtral | ✓ values (1) |" in table
    assert "1. no kernel: ours equal the source's files byte for byte." in table


def test_a_cell_that_needs_an_option_says_so() -> None:
    table = support_table.render({"cells": [cell("vllm", note="with `a`: b"), cell("sglang")]})
    assert "| Qwen3-MoE | ✓ 3e-06 (1) | ✓ 3e-06 |" in table
    assert "1. With `a`: b." in table


def test_a_limit_that_for_avoids_says_so() -> None:
    limited = cell("sglang", passed=False, limit="SGLang ignores it", note="`--for sglang` writes one that it reads")
    table = support_table.render({"cells": [limited]})
    assert "1. SGLang ignores it, in the stock checkpoint too; `--for sglang` writes one that it reads." in table


@pytest.mark.parametrize(("change", "code"), [("", 0), ("edited by hand\n", 1)])
def test_check_notices_a_table_that_was_edited(tmp_path: Path, change: str, code: int) -> None:
    readme, matrix = tmp_path / "README.md", tmp_path / "readers.json"
    readme.write_text(f"# Title\n{support_table.BEGIN}\n{support_table.END}\ntail\n")
    matrix.write_text(json.dumps({"cells": [cell("vllm")]}))
    command = [sys.executable, str(SCRIPT), "--readme", str(readme), "--matrix", str(matrix)]
    assert subprocess.run(command, check=False).returncode == 0
    readme.write_text(readme.read_text().replace(support_table.END, change + support_table.END))
    assert subprocess.run([*command, "--check"], check=False, stderr=subprocess.DEVNULL).returncode == code
    assert readme.read_text().startswith("# Title\n")
    assert readme.read_text().endswith("tail\n")
