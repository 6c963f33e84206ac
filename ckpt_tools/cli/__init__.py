"""The `ckpt` command. Imports typer and nothing heavier; a verb imports what it needs when it runs."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `ckpt` script and of `python -m ckpt_tools`."""
    from ckpt_tools.cli.app import app

    app(prog_name="ckpt")
