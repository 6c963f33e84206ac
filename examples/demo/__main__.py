"""`make demo`: the whole path on a small Qwen3-MoE, each command shown, each result checked, under two minutes.

A stock repository -> native checkpoint -> training by two processes -> DCP shards -> a Hugging Face repository ->
stock transformers. Everything is written to demo-out/; the exit code is 0 only when every check passed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from examples.walkthrough import BIN, ROOT, Walkthrough, play

HERE = Path(__file__).parent
OUT = ROOT / "demo-out" / "qwen3-moe"
CKPT, PYTHON = BIN / "ckpt", BIN / "python"
STEPS = 40
LEARNED = 1.0
"""Nats per token by which both losses must fall; 40 steps reach about four."""


def scenario(demo: Walkthrough) -> None:
    source, native, run, trained = (OUT / name for name in ("source", "native", "run", "trained"))
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)

    demo.step("A Qwen3-MoE repository, written by stock transformers")
    demo.run("make the source", PYTHON, HERE / "make_model.py", source)
    before = read_back(demo, source, "source")

    demo.step("Hugging Face -> native: experts stacked, query/key/value and gate/up fused")
    demo.run("convert", CKPT, "convert", source, native)
    demo.run("native = source, bit for bit", CKPT, "verify", native, "--against", source)
    demo.run("round trip, bit for bit", CKPT, "roundtrip", source, "--mesh", "ep=2")

    demo.step("Training by two processes: FSDP2 x expert parallel")
    demo.run("train", CKPT, "train", HERE / "train.yaml", "--nproc-per-node", "2")
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    fell = len(losses) == STEPS and losses[0] - losses[-1] > LEARNED
    demo.check("training loss fell", fell, f"{losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps")

    demo.step("Native shards -> a Hugging Face repository")
    saved = ROOT / json.loads((run / "report.json").read_text(encoding="utf-8"))["checkpoint"]
    demo.run("consolidate", CKPT, "consolidate", saved, trained)
    demo.run("repository is whole", CKPT, "verify", trained)
    demo.run("repository = shards, bit for bit", CKPT, "verify", trained, "--against", saved)
    same = all((trained / name.name).read_bytes() == name.read_bytes() for name in source.glob("tokenizer*"))
    demo.check("tokenizer kept byte for byte", same, "tokenizer.json, tokenizer_config.json")

    demo.step("Stock transformers reads it")
    after = read_back(demo, trained, "trained")
    fell = before["loss"] - after["loss"] > LEARNED
    demo.check("loss on unseen chapters fell", fell, f"{before['loss']:.2f} -> {after['loss']:.2f}")
    demo.check("it writes text", len(after["text"]) > len(after["prompt"]), repr(after["text"]))


def read_back(demo: Walkthrough, checkpoint: Path, what: str) -> dict[str, Any]:
    """Have stock transformers load a repository, in a process that knows nothing of this project."""
    command = (PYTHON, HERE / "read_back.py", checkpoint, HERE / "data" / "held_out.txt")
    report: dict[str, Any] = json.loads(demo.run(f"{what}: transformers loads it", *command, echo=False))
    demo.console.print(f"loss on unseen chapters: {report['loss']:.2f}")
    demo.console.print(f"writes: {report['text']!r}", markup=False)
    names = len(report["missing"]) + len(report["unexpected"])
    demo.check(f"{what}: every name in its place", names == 0, f"{names} missing or unexpected")
    return report


if __name__ == "__main__":
    sys.exit(play(Walkthrough("make demo", OUT.relative_to(ROOT)), scenario))
