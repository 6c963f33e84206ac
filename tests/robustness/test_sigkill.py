"""The real command, killed by SIGKILL at random times: 20 in the quick suite, 200 with `--full`."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckpt_tools import convert, verify
from ckpt_tools.core.dtypes import DTYPES
from tests.checkpoints import write_repository
from tests.robustness.scenarios import tree

COMMAND = """
import sys
from ckpt_tools.engine import execute, plan
# More calls to be killed at than the few that this little data would take.
execute.WINDOW = 1 << 14
plan.SEGMENT = 1 << 17
from ckpt_tools.cli import main
main()
"""


class Killed:
    """Runs of `ckpt convert` that are killed.

    Attributes:
        kills: how many processes were killed in the middle of a run.
    """

    def __init__(self, root: Path) -> None:
        tensors = {f"layer.{i}.weight": (DTYPES["BF16"], (512, 1024)) for i in range(12)}
        self.source = write_repository(root / "source", tensors, {"model_type": "unheard-of"}, max_shard_size=4 << 20)
        self.older = write_repository(root / "older", {"old": (DTYPES["U8"], (5000,))}, {"model_type": "unheard-of"})
        self.out = root / "work" / "out"
        self.kills = 0

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COMMAND, "convert", str(self.source), str(self.out), "--overwrite", "--quiet"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def finish(self) -> None:
        """A run that nobody kills."""
        process = self.start()
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said

    def kill_after(self, seconds: float) -> bool:
        """Whether a run was killed that many seconds after it had taken its lock; False where it ended before."""
        process = self.start()
        lock = self.out.with_name(f".{self.out.name}.ckpt-lock")
        left_over = lock.stat().st_mtime_ns if lock.exists() else None
        while process.poll() is None and (not lock.exists() or (left_over and _is_free(lock))):
            time.sleep(0.001)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        self.kills += process.returncode == -signal.SIGKILL
        return process.returncode == -signal.SIGKILL


def _is_free(lock: Path) -> bool:
    """Whether no process holds the lock that a killed one left."""
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "overwrite"])
def test_random_kills_of_the_command_lose_nothing(tmp_path: Path, full: bool, old: bool) -> None:
    runs = Killed(tmp_path)
    if old:
        convert(runs.older, runs.out)
    before = tree(runs.out) if old else {}
    started = time.monotonic()
    runs.finish()
    lasts, expected = time.monotonic() - started, tree(runs.out)
    generator = random.Random(old)
    while runs.kills < (100 if full else 10):
        _reset(runs, old)
        # Two to four kills in a row, so that a resumed run is killed, too.
        for _ in range(generator.randint(2, 4)):
            if not runs.kill_after(generator.uniform(0, lasts / 3)):
                break
            found = tree(runs.out) if runs.out.exists() else {}
            found.pop(".ckpt-journal", None)
            assert found in (before, expected)
        runs.finish()
        assert tree(runs.out) == expected
        assert [path.name for path in runs.out.parent.iterdir()] == ["out"]
    # The digests are of segments of another size than `verify` takes.
    verify(runs.out, against=runs.source, digests=False)


def _reset(runs: Killed, old: bool) -> None:
    shutil.rmtree(runs.out.parent)
    if old:
        convert(runs.older, runs.out)
