"""`python -m tests.hostile.fuzz.coverage TARGET [libFuzzer options]`: one target under atheris, from the corpus."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ckpt_tools"]):
    from tests.hostile.fuzz.grammar import generators
    from tests.hostile.fuzz.targets import Targets

CORPUS = Path(__file__).parent.parent / "corpus"


def main() -> None:
    target, *options = sys.argv[1:]
    targets = Targets()
    make = generators(targets)[target]
    seeds = targets.root / "seeds"
    seeds.mkdir()
    for number in range(200):
        (seeds / str(number)).write_bytes(make(random.Random(number)))
    folders = [str(folder) for folder in (seeds, CORPUS / target) if folder.is_dir()]

    def one_input(data: bytes) -> None:
        targets.run(target, data)

    # The first folder is the one that atheris writes new inputs to.
    atheris.Setup([sys.argv[0], *options, *folders], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
