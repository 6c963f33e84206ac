"""`torchrun ... -m automodel.training CONFIG.yaml [--set section.key=value ...]`."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from typing import NoReturn

from automodel.training.loop import run
from ckpt_tools.core.errors import CkptError


def main(arguments: list[str] | None = None) -> int:
    """Run one process of a training job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m automodel.training", description="Train as a YAML config says.")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="change one value"
    )
    options = parser.parse_args(arguments)
    try:
        run(options.config, options.overrides)
    except CkptError as error:
        sys.stderr.write(f"error: {error.message}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return error.exit_code
    return 0


def _end(code: int) -> NoReturn:
    """End the process with what is to be done at exit, but not the interpreter first.

    A thread of gloo may still have to let go of the last collective's tensors, for which it needs the interpreter; if
    that is ending, the process dies by SIGABRT, and a job that is done has failed (pytorch/pytorch#190489).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
