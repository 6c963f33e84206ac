"""Makes each reader's own virtual environment, cached by the hash of its pins: transformers 4, vLLM and SGLang.

`python environments.py NAME` prints the environment's interpreter, building the environment first where it is not yet
there (vLLM and SGLang: about 3.4 GB each). Pins are complete lists, installed without resolving, after PyTorch, whose
exact pin may be served by a local CPU build. Standard library only: it must run before anything is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
BUILT = ("transformers4", "vllm", "sglang")
"""Readers with an environment of their own; transformers 5 is read with the development environment itself."""
PYTHON_OF = {"sglang": (3, 11), "vllm": (3, 11)}
"""Python versions that a reader's wheels are made for."""
ROOM = {"transformers4": 3, "vllm": 8, "sglang": 8}
"""GB that are free before an environment is built: for it, and for tests that run beside it."""


def python_for(name: str, *, build: bool = True) -> Path | None:
    """The interpreter of a reader's environment; None where it is not built and `build` is false.

    Raises subprocess.CalledProcessError when an installation fails, FileNotFoundError when the Python that the
    reader's wheels need is not on this machine, OSError when the disk is too full.
    """
    if name not in BUILT:
        raise ValueError(f"no environment named {name}; there are {', '.join(BUILT)}")
    pins = HERE / f"constraints-{name}.txt"
    home = _cache() / f"{name}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}"
    python, complete = home / "bin" / "python", home / "complete"
    if not complete.exists():
        if not build:
            return None
        with _locked(home.with_suffix(".lock")):
            if not complete.exists():
                _build(name, home, pins)
                complete.touch()
    return python


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckpt-tools" / "readers"


def _build(name: str, home: Path, pins: Path) -> None:
    free = shutil.disk_usage(home.parent).free / 1e9
    if free < ROOM[name]:
        raise OSError(f"the {name} environment takes {ROOM[name]} GB to build; {home.parent} has {free:.1f} GB free")
    print(f"Building the {name} environment in {home}", file=sys.stderr, flush=True)
    shutil.rmtree(home, ignore_errors=True)
    try:
        _install(name, home, pins)
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise


def _install(name: str, home: Path, pins: Path) -> None:
    _run(_base_python(name), "-m", "venv", home)
    torch = next(line for line in pins.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    install = (home / "bin" / "python", "-m", "pip", "install", "-qq", "--disable-pip-version-check")
    _run(*install, "--constraint", pins, torch)
    _run(*install, "--no-deps", "--requirement", pins)


def _base_python(name: str) -> str:
    wanted = PYTHON_OF.get(name)
    if wanted is None or sys.version_info[:2] == wanted:
        return sys.executable
    command = f"python{wanted[0]}.{wanted[1]}"
    if (found := shutil.which(command)) is None:
        raise FileNotFoundError(f"{name} has wheels for Python {wanted[0]}.{wanted[1]}: {command} is not on the PATH")
    return found


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Print the interpreter of a reader's environment; build it if needed.")
    parser.add_argument("name", choices=BUILT)
    parser.add_argument("--no-build", action="store_true", help="fail instead of building")
    arguments = parser.parse_args()
    python = python_for(arguments.name, build=not arguments.no_build)
    if python is None:
        print(f"The {arguments.name} environment is not built.", file=sys.stderr)
        return 1
    print(python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
