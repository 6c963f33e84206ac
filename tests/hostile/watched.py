"""Runs verbs in a process of its own under an audit hook, and reports what they did beyond reading.

`python -m tests.hostile.watched` reads lines of JSON, `[verb, path, output]`, and answers each with a line
`{"outcome": ..., "message": ..., "events": [...]}`. Everything that a verb imports lazily is imported by a harmless
run first, so that any import afterwards is the checkpoint's doing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_RUNS = (
    *("import", "exec", "compile", "marshal.loads", "pickle.find_class", "code.__new__", "function.__new__"),
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn"),
    *(
        "socket.connect",
        "socket.bind",
        "socket.getaddrinfo",
        "webbrowser.open",
        "ctypes.dlopen",
        "shutil.unpack_archive",
    ),
)
_CHANGES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate"),
    *("os.utime", "shutil.rmtree", "shutil.copyfile", "shutil.move"),
)


class Watch:
    """Collects audit events while it is on; changes of files below `allowed` are not among them."""

    def __init__(self) -> None:
        self.on = False
        self.allowed = ""
        self.events: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "ctypes.dlopen" and args[0] is None:
            return  # the C library that the process runs on
        if event in _RUNS:
            self.events.append(f"{event} {args!r}"[:200])
        elif event == "open" and isinstance(args[2], int) and args[2] & _WRITES:
            self._change(event, args[:1])
        elif event in _CHANGES:
            self._change(event, args)

    def _change(self, event: str, args: Iterable[object]) -> None:
        for path in args:
            if isinstance(path, str | bytes | os.PathLike) and os.path.isabs(path):
                folder, name = os.path.split(os.fsdecode(path))
                real = os.path.join(os.path.realpath(folder), name)
                if not self.allowed or os.path.commonpath([real, self.allowed]) != self.allowed:
                    self.events.append(f"{event} {path!r}")


def serve() -> None:
    import ml_dtypes  # noqa: F401 - imported where values are cast or compared
    import numpy  # noqa: F401

    import ckpt_tools
    from ckpt_tools.core.errors import CkptError
    from ckpt_tools.families import family_of
    from tests.hostile.specimens import SPECIMENS

    def act(verb: str, path: str, output: str) -> None:
        if output:
            getattr(ckpt_tools, verb)(path, output)
        else:
            getattr(ckpt_tools, verb)(path)

    family_of({})
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(("hf sharded", "dcp of a mesh", "sharded safetensors")):
            root = SPECIMENS[name](Path(folder, str(number)))
            for verb in ("inspect", "verify"):
                act(verb, str(root), "")
    for line in sys.stdin:
        verb, path, output = json.loads(line)
        watch.events, watch.allowed = [], os.path.realpath(os.path.dirname(output)) if output else ""
        watch.on = True
        try:
            act(verb, path, output)
            outcome, message = "ok", ""
        except CkptError as error:
            outcome, message = type(error).__name__, error.message
        except BaseException as error:
            outcome, message = f"DEFECT {type(error).__name__}", str(error)
        watch.on = False
        sys.stdout.write(json.dumps({"outcome": outcome, "message": message, "events": watch.events}) + "\n")
        sys.stdout.flush()


class Watched:
    """The other end: a process that is asked for one verb after another."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.hostile.watched"]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def run(self, verb: str, path: Path, output: Path | None = None) -> dict[str, Any]:
        """Outcome (`ok` or the class of the error), message, and events that should not have been."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the watched process has no pipes")
        self._process.stdin.write(json.dumps([verb, str(path), str(output or "")]) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate()


if __name__ == "__main__":
    serve()
