"""Packages are looked for without being imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ckpt_tools.core.packages import EXTRAS, NEEDED, Package, is_found, look_for


def test_a_package_is_found_with_its_version_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doctored.py").write_text("raise SystemExit")
    (tmp_path / "doctored-1.2.dist-info").mkdir()
    (tmp_path / "doctored-1.2.dist-info" / "METADATA").write_text("Name: doctored\nVersion: 1.2\n")
    (tmp_path / "unversioned.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    names = ("doctored", "unversioned", "absent")
    found = look_for(Package(name, name, "tests", name) for name in names)
    assert [report.version for report in found] == ["1.2", "unknown", None]
    assert found[2].install == "pip install absent"
    assert not sys.modules.keys() & set(names)


def test_a_distribution_without_its_module_is_not_installed() -> None:
    assert look_for([Package("pytest", "no_such_module", "tests", "pytest")])[0].version is None


def test_a_module_whose_package_is_missing_is_not_found() -> None:
    assert not is_found("no_such_package.module")
    assert is_found("importlib.metadata")


def test_the_packages_that_the_tools_need_are_those_of_the_project_file() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = project.partition("\ndependencies = [")[2].partition("]")[0].lower()
    declared = {line.strip().strip('",').partition(">")[0] for line in dependencies.splitlines() if line.strip()}
    assert {package.name.lower() for package in NEEDED} == declared
    assert all(f"\n{extra} = [" in project for extra in ("fast", "remote"))
    assert {"isal", "fsspec"} <= {package.name for package in EXTRAS}
