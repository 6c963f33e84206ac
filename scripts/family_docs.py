"""Writes docs/families.md from the layouts themselves; `--check` only says whether it is current."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ckpt_tools.families import FAMILIES, get_family
from ckpt_tools.families.family import Family

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
HEAD = """# Families

What each native tensor is made of. Made by `python scripts/family_docs.py` from `ckpt_tools/families/`; do not edit.
`ckpt explain CHECKPOINT NAME` answers for one tensor of a checkpoint. A family that is not here keeps its names.

A family with a native model trains in its native tensors. One that is data only trains through transformers' class: its
native tensors are those that transformers 5 holds in memory. transformers 4 holds the tensors of the files, mostly.
"""


def render(family: Family) -> str:
    """The section of one family."""
    kind = "data only" if family.data_only else "native model"
    belongs = f"`{family.architecture}`, `model_type`: {', '.join(family.model_types)}; {kind}"
    lines = [f"## {family.title}", "", belongs, ""]
    lines += ["| native tensor | made of | where |", "|---|---|---|"]
    for rule in family.rules:
        where = ", ".join(filter(None, (f"{rule.layers} layers" if rule.layers else "", rule.when or "")))
        made_of = rule.value.describe().replace(rule.native, "the same name")
        lines.append(f"| `{rule.native}` | {made_of} | {where} |")
    for name, twin in family.tied:
        lines += ["", f"`{name}` is not on disk when `tie_word_embeddings` is set: it shares `{twin}`."]
    return "\n".join(lines)


def _overview() -> str:
    rows = ["| family | trains as |", "|---|---|"]
    for family in map(get_family, FAMILIES):
        link = re.sub(r"[^\w -]", "", family.title.lower()).replace(" ", "-")
        rows.append(f"| [{family.title}](#{link}) | {'transformers class' if family.data_only else 'native model'} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the document is out of date")
    text = "\n\n".join([HEAD.strip(), _overview(), *(render(get_family(name)) for name in FAMILIES)]) + "\n"
    if parser.parse_args().check:
        if not DOCUMENT.exists() or DOCUMENT.read_text() != text:
            print(f"{DOCUMENT} is out of date. hint: python scripts/family_docs.py", file=sys.stderr)
            return 1
        return 0
    DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
