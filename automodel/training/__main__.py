"""`torchrun ... -m automodel.training CONFIG.yaml [--set section.key=value ...]`."""

from __future__ import annotations

import argparse
import sys

from automodel.training.loop import run
from ckpt_tools.core.ending import end_process
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


if __name__ == "__main__":
    end_process(main())
