"""Write docs/cli.md from the command line itself; with --check, fail when the page is not up to date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ckpt_tools.cli.reference import Parameter, Verb, verbs

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
INTRODUCTION = """\
# The command line

<!-- Written by scripts/cli_docs.py; change the texts in ckpt_tools/cli/ and run it again. -->

`ckpt VERB --help` shows the same on a terminal; `python -m ckpt_tools` is the same command. The functions of
`ckpt_tools` have the same names and parameters as the verbs.

- Results go to stdout; progress, hints and errors go to stderr.
- `--json` prints one JSON object on stdout and nothing else there, errors included:
  `{"error": ..., "hint": ..., "exit_code": ...}`. Progress stays on stderr unless `--quiet` is given too.
- Progress is a bar on a terminal and a line every five seconds elsewhere. `NO_COLOR` is respected.
- An existing output is never touched without `--overwrite`, and then it stays until the new one is whole.
- `torchrun --nproc-per-node N -m ckpt_tools convert ...` (or `consolidate`) shares one plan among N processes, on one
  machine or on several that share a file system; so does `python -m ckpt_tools` wherever RANK and WORLD_SIZE are set.
  `--threads` and `--memory` are those of each process, rank 0 alone prints, and any other verb is run by it alone. A
  rerun resumes with any N. `ckpt`, and the functions without `ranks`, ignore these variables.
- Exit codes: [errors.md](errors.md). Completion of verbs, options, families, dtypes and mesh axes:
  `ckpt --install-completion`.
"""


def page() -> str:
    """The whole page."""
    found = verbs()
    table = ["| verb | does |", "|---|---|"]
    table += [f"| [`{verb.name}`](#{verb.name}) | {_cell(verb.help.partition(chr(10))[0])} |" for verb in found]
    return "\n".join([INTRODUCTION, *table, "", *(line for verb in found for line in _section(verb))])


def _section(verb: Verb) -> Iterator[str]:
    arguments = [parameter for parameter in verb.parameters if parameter.kind == "argument"]
    options = [parameter for parameter in verb.parameters if parameter.kind == "option"]
    usage = " ".join(p.names[0] if p.required else f"[{p.names[0]}]" for p in arguments)
    yield from (f"## {verb.name}", "", f"`ckpt {verb.name} {usage} [OPTIONS]`", "", verb.help, "")
    yield from ("```sh", *verb.examples, "```", "")
    yield from ("| argument or option | values | default | |", "|---|---|---|---|")
    yield from map(_row, (*arguments, *options))
    yield ""


def _row(parameter: Parameter) -> str:
    names = ", ".join(f"`{name}`" for name in parameter.names)
    default = "required" if parameter.required else f"`{parameter.default}`" if parameter.default else ""
    return f"| {names} | {_cell(parameter.values)} | {default} | {_cell(parameter.help)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when the page would change")
    wanted = page()
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != wanted:
            sys.stderr.write("docs/cli.md is not up to date: run python scripts/cli_docs.py\n")
            return 1
        return 0
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
