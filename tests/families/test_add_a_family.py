"""docs/add-a-family.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "add-a-family.md").read_text(encoding="utf-8")
NEEDED = ("ckpt_tools", "automodel", "benchmarks", "tests", "scripts", "docs", "examples", "pyproject.toml")


def block(after: str, language: str) -> str:
    """The first code block of a language behind a text of the document."""
    _, found, rest = DOCUMENT.partition(after)
    assert found, f"the document no longer says {after!r}"
    match = re.search(rf"```{language}\n(.*?)```", rest, re.DOTALL)
    assert match is not None
    return match[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in NEEDED:
        ignored = shutil.ignore_patterns("__pycache__", "data")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(copy: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_steps_of_the_document_add_a_family(copy: Path) -> None:
    pytest.importorskip("transformers")
    path = re.search(r"^`(ckpt_tools/families/(\w+)\.py)`:$", DOCUMENT, re.MULTILINE)
    assert path is not None
    assert not (copy / path[1]).exists(), "the example is a family by now: take another one"
    (copy / path[1]).write_text(block(path[0], "python"), encoding="utf-8")
    configs = copy / "tests" / "checkpoints.py"
    before, opening, rest = configs.read_text(encoding="utf-8").partition("\nCONFIGS: ")
    inside, closing, after = rest.partition("\n}\n")
    line = block("At the end of `CONFIGS`", "python")
    assert line.count("\n") == 1
    configs.write_text(f"{before}{opening}{inside}\n{line.rstrip()}{closing}{after}", encoding="utf-8")
    tests, documents = (shlex.split(line)[1:] for line in block("## 3. The checks", "sh").splitlines())
    found = run(copy, sys.executable, *tests, "-rp")
    for part in (
        "same_number_of_elements",
        "bit_for_bit",
        "hugging_face_names_shapes",
        "one_side_of_a_data_only_layout",
    ):
        assert re.search(rf"PASSED \S*{part}\S*\[{path[2]}\S*\]", found), f"{part} did not run:\n{found}"
    run(copy, sys.executable, *documents)
    assert f"`model_type`: {path[2]}" in (copy / "docs" / "families.md").read_text(encoding="utf-8")
    assert path[2] in run(copy, sys.executable, "-m", "ckpt_tools", "families")
    run(copy, sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), path[1], str(configs))
    run(copy, sys.executable, "-m", "ruff", "format", "--check", path[1], str(configs))
