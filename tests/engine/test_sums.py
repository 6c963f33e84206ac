"""SHA256SUMS: what sha256sum reads, found wrong when a file is, and never taken along."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from ckpt_tools import consolidate, convert, verify
from ckpt_tools.core.errors import FormatError, MismatchError
from tests.checkpoints import make_repository


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `native` and `hf`, both with sums."""
    root = tmp_path_factory.mktemp("sums")
    source = make_repository(root / "source")
    (source / "SHA256SUMS").write_text(f"{'0' * 64}  of/another.file\n")
    convert(source, root / "native", mesh="dp_shard=2", sha256=True)
    consolidate(root / "native", root / "hf", max_shard_size=30_000, sha256=True)
    return root


@pytest.mark.parametrize("name", ["native", "hf"])
def test_every_file_is_listed_with_its_digest(made: Path, name: str) -> None:
    lines = (made / name / "SHA256SUMS").read_text().splitlines()
    found = {path: digest for digest, path in (line.split("  ") for line in lines)}
    files = [path for path in (made / name).rglob("*") if path.is_file() and path.name != "SHA256SUMS"]
    assert found == {str(p.relative_to(made / name)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    assert lines == sorted(lines, key=lambda line: line[66:])
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=made / name, check=True)


def test_sums_are_verified_and_not_carried_along(made: Path, tmp_path: Path) -> None:
    assert any("SHA-256 in SHA256SUMS" in check for check in verify(made / "hf").checks)
    consolidate(made / "native", tmp_path / "plain")
    assert not list(tmp_path.rglob("SHA256SUMS"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda root: (root / "README.md").write_text("unlisted"), None),
        (lambda root: (root / "config.json").write_bytes((root / "config.json").read_bytes() + b"\n"), "config.json"),
        (lambda root: (root / "generation_config.json").unlink(), "generation_config.json"),
    ],
    ids=["another file", "changed", "missing"],
)
def test_a_file_that_is_not_as_it_was_is_named(made: Path, tmp_path: Path, damage: object, said: str | None) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    (tmp_path / "hf/ckpt-manifest.json").unlink()
    lines = (tmp_path / "hf/SHA256SUMS").read_text().splitlines(keepends=True)
    (tmp_path / "hf/SHA256SUMS").write_text("".join(line for line in lines if "ckpt-manifest" not in line))
    damage(tmp_path / "hf")  # type: ignore[operator]
    if said is None:
        verify(tmp_path / "hf")
        return
    with pytest.raises(MismatchError, match=f"1 files are missing or do not have the SHA-256 in SHA256SUMS\n  {said}"):
        verify(tmp_path / "hf")
    verify(tmp_path / "hf", digests=False)


@pytest.mark.parametrize(
    "line", ["nonsense", f"{'0' * 64}  ../../etc/passwd", f"{'0' * 63}  x", f"{'0' * 64}  a\n" * 2]
)
def test_a_list_that_is_none_is_refused(made: Path, tmp_path: Path, line: str) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    (tmp_path / "hf/SHA256SUMS").write_text(f"{line}\n")
    with pytest.raises(FormatError, match="SHA256SUMS"):
        verify(tmp_path / "hf")
