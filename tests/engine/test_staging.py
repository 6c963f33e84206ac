"""Locks, resuming and the atomic commit: the final path is absent, wholly old or wholly new."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ckpt_tools.core.errors import LockedError, OutputExistsError, UsageError
from ckpt_tools.engine.execute import Outcome
from ckpt_tools.engine.staging import Staging


def test_the_output_appears_only_on_commit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Staging(out) as staging:
        staging.resume("plan").close()
        staging.write_document("sub/file.json", b"{}")
        assert not out.exists()
        staging.commit()
    assert (out / "sub/file.json").read_bytes() == b"{}"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["sub"]


def test_an_existing_output_is_refused_without_overwrite_and_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(OutputExistsError, match="exists"):
        Staging(out)
    assert (out / "old").read_text() == "old"


def test_overwrite_replaces_the_old_output_in_one_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with Staging(out, overwrite=True) as staging:
        staging.resume("plan").close()
        staging.write_document("new", b"new")
        assert (out / "old").read_text() == "old"
        staging.commit()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_second_run_into_the_same_output_is_refused(tmp_path: Path) -> None:
    with Staging(tmp_path / "out"), pytest.raises(LockedError, match="another run"), Staging(tmp_path / "out"):
        pass
    with Staging(tmp_path / "out"):
        pass


def test_the_lock_of_a_dead_process_does_not_hold(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from ckpt_tools.engine.staging import Staging\n"
        "Staging(Path(sys.argv[1])).__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False).returncode == 9
    assert (tmp_path / ".out.ckpt-lock").exists()
    with Staging(tmp_path / "out"):
        pass


def test_the_journal_of_the_same_plan_goes_on_and_of_another_plan_does_not(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        journal = staging.resume("plan")
        journal.record(7, Outcome(b"d" * 16, False))
        journal.close()
        staging.write_document("part", b"")
        again = staging.resume("plan")
        assert again.done == {7: Outcome(b"d" * 16, False)}
        again.close()
        other = staging.resume("other plan")
        assert other.done == {}
        other.close()
        assert not (staging.path / "part").exists()


def test_half_a_record_at_the_end_of_a_journal_does_not_count(tmp_path: Path) -> None:
    with Staging(tmp_path / "out") as staging:
        journal = staging.resume("plan")
        journal.record(1, Outcome(b"a" * 16, True))
        journal.close()
        path = staging.path / ".ckpt-journal"
        path.write_bytes(path.read_bytes() + b"half")
        again = staging.resume("plan")
        again.record(2, Outcome(b"b" * 16, False))
        again.close()
        assert staging.resume("plan").done == {1: Outcome(b"a" * 16, True), 2: Outcome(b"b" * 16, False)}


def test_a_symbolic_link_planted_at_the_output_or_the_lock_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "out").symlink_to(victim)
    with pytest.raises(UsageError, match="symbolic link"):
        Staging(tmp_path / "out", overwrite=True)
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / ".other.ckpt-lock").symlink_to(target)
    with pytest.raises(Exception, match="lock"), Staging(tmp_path / "other"):
        pass
    assert target.read_text() == "precious"
