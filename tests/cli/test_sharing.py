"""What the command says about sharing blocks, and how it is told what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_tools.core.sizes import format_size
from ckpt_tools.engine import sharing
from tests.checkpoints import make_repository
from tests.cli.conftest import Run
from tests.engine.file_systems import BLOCK, StandIn, stand_in


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setattr(sharing, "WORTH", BLOCK)
    return stand_in(monkeypatch)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "source", hidden_size=128, moe_intermediate_size=96, vocab_size=4096)


@pytest.mark.usefixtures("double")
def test_plan_and_run_say_how_much_is_shared_and_what_has_no_digest(ckpt: Run, large: Path, tmp_path: Path) -> None:
    planned, report = ckpt("plan", large), ckpt("plan", large, "--json").json
    made = ckpt("convert", large, tmp_path / "native")
    percent, undigested = 100 * report["shared"] / report["nbytes"], report["undigested"]
    assert percent > 90
    for ran in (planned, made):
        assert f"shared   {format_size(report['shared'])}, {percent:.1f} %, without a copy on the disk" in ran.stdout
        assert f"digests  none for {undigested} tensors that are shared unread; --digests makes them" in ran.stdout
    checked = ckpt("verify", tmp_path / "native")
    assert f"none recorded for {undigested} tensors, which shared their blocks with the source" in checked.stdout
    again = ckpt("consolidate", tmp_path / "native", tmp_path / "back", "--digests", "--json")
    assert again.json["shared"] > 0.9 * again.json["nbytes"]
    assert again.json["undigested"] == 0


def test_reflink_is_never_auto_or_always(ckpt: Run, large: Path, tmp_path: Path, double: StandIn) -> None:
    never = ckpt("convert", large, tmp_path / "never", "--reflink", "never")
    assert never.code == double.calls == 0
    assert "shared" not in never.stdout
    assert ckpt("convert", large, tmp_path / "always", "--reflink", "always", "--json").json["shared"] > 0
    double.refusing.update(path.stat().st_ino for path in large.glob("*.safetensors"))
    refused = ckpt("convert", large, tmp_path / "refused", "--reflink", "always")
    assert refused.code == 2
    assert "cannot share blocks with" in refused.stderr
    assert "--reflink auto" in refused.stderr
    assert not (tmp_path / "refused").exists()
    assert ckpt("convert", large, tmp_path / "auto", "--json").json["shared"] == 0
    assert ckpt("verify", tmp_path / "auto", "--against", large).code == 0
