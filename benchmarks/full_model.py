"""A whole model's way from the GPUs that train it to a published repository: save, export, consolidate, verify.

    python benchmarks/full_model.py --case qwen3-30b --gpus 4 --scratch /tmp/full-model
    python benchmarks/full_model.py --case qwen3-30b --gpus 4 --dry

Weights are made by each process on its own device; steps are trained before the save and after it. `save` is what
`ckpt train` writes (with `--optimizer` its states, too), `beside` the same while training goes on, `export` is
`save_pretrained` from the mesh, and the rest are the commands, as processes from start to end. Prints a table with GB/s
and writes JSON after every phase. The page cache is not emptied in between, as it would not be after training.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import training_dry
from training_cases import CASES

if TYPE_CHECKING:
    from training_trainee import Trainee

PHASES = ("save", "beside", "export", "consolidate", "verify", "against")
"""`beside` saves again while training goes on; `verify` compares digests, `against` the repository with the checkpoint,
bit for bit."""

ON_DEVICES = ("save", "beside", "export")
"""Phases of the training processes."""


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        for row in _on_devices(arguments):
            print("ROW " + json.dumps(row), flush=True)
        return
    if arguments.dry:
        training_dry.shrink(arguments)
    phases = [phase for phase in PHASES if phase in arguments.phases.split(",")]
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for phase in phases:
        if phase in ON_DEVICES:
            rows += _train(arguments) if phase == next(p for p in phases if p in ON_DEVICES) else []
        else:
            rows.append(_command(arguments, phase))
        document = {"configuration": _configuration(arguments), "rows": rows}
        path = arguments.out / f"full-model-{arguments.case}-{arguments.gpus}gpu.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _print_table(rows)
    if not arguments.keep:
        shutil.rmtree(arguments.scratch)
    if any("error" in row for row in rows):
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="qwen3-30b")
    parser.add_argument("--gpus", type=int, default=4, help="processes, one for each GPU")
    parser.add_argument("--ep", default="", help="processes that divide the experts; all by default")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument(
        "--optimizer", action="store_true", help="save the optimizer's states, too: three times the size"
    )
    parser.add_argument("--processes", type=int, default=1, help="that share the consolidation")
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--warmup", type=int, default=1, help="steps before the save")
    parser.add_argument("--steps", type=int, default=1, help="steps after the save")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/full-model"), help="for checkpoint and repositories")
    parser.add_argument("--keep", action="store_true", help="leave them there")
    parser.add_argument("--dry", action="store_true", help="tiny widths in FP32 on CPUs")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmark-out")))
    parser.add_argument("--limit", type=float, default=480, help="seconds for one process")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "case": arguments.case,
        "config": CASES[arguments.case],
        "gpus": arguments.gpus,
        "ep": arguments.ep or arguments.gpus,
        "dtype": arguments.dtype,
        "optimizer": arguments.optimizer,
        "processes": arguments.processes,
        "file_system": _file_system(arguments.scratch),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def _file_system(path: Path) -> str:
    done = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _train(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the training processes."""
    if arguments.dry:
        return training_dry.forked(arguments.gpus, lambda: _on_devices(arguments))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.gpus}"]
    done = _run(arguments, [*launcher, Path(__file__).as_posix(), *sys.argv[1:], "--child"])
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    shutil.rmtree(arguments.scratch / "exported", ignore_errors=True)
    return rows if done.returncode == 0 else [*rows, {"phase": "training", "error": done.stderr[-600:]}]


def _command(arguments: argparse.Namespace, phase: str) -> dict[str, Any]:
    """The row of one of our commands, from a process of its own."""
    native, published = arguments.scratch / "step", arguments.scratch / "published"
    verbs = {
        "consolidate": ["consolidate", native, published],
        "verify": ["verify", published],
        "against": ["verify", published, "--no-digests", "--against", native],
    }
    launcher: list[str] = []
    if phase == "consolidate" and arguments.processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
    command = [*launcher, "-m", "ckpt_tools", *map(str, verbs[phase]), "--json"]
    begun = time.perf_counter()
    done = _run(arguments, command)
    seconds = time.perf_counter() - begun
    if done.returncode:
        return {"phase": phase, "error": f"exit {done.returncode}: {done.stderr[-600:]}"}
    report = json.loads(done.stdout)
    return {"phase": phase, **_rate(report["nbytes"], seconds), "report": report}


def _run(arguments: argparse.Namespace, command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=arguments.limit, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"killed after {arguments.limit:g} s")


def _on_devices(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the training processes, on the first of them; all of them run this."""
    from training_trainee import build

    from automodel.parallel.agree import is_first
    from automodel.training.processes import process_group

    arguments.child, arguments.ep = "ours", arguments.ep or str(arguments.gpus)
    with process_group(arguments.limit / 60):
        for row in _acts(arguments, build(arguments)):
            if is_first():
                yield row


def _acts(arguments: argparse.Namespace, trainee: Trainee) -> Iterator[dict[str, Any]]:
    """Make weights, train, save, train on, export; a row of each."""
    phases = arguments.phases.split(",")
    _, seconds = _timed(lambda: trainee.start_over(checkpointing=False))
    yield {"phase": "make weights", "seconds": seconds}
    if "save" in phases:
        yield from _steps(trainee, arguments, arguments.warmup, "step before the save")
        state, write = _checkpoint(trainee, arguments)
        _, seconds = _timed(write)
        yield {"phase": "save", **_rate(_bytes_of(state), seconds)}
        yield from _steps(trainee, arguments, arguments.steps, "step after the save")
    if "beside" in phases:
        yield from _beside(trainee, arguments)
    if "export" in phases:
        exported = arguments.scratch / "exported"
        _, seconds = _timed(lambda: trainee.model.save_pretrained(exported))
        nbytes = sum(file.stat().st_size for file in exported.glob("*.safetensors"))
        yield {"phase": "export", **_rate(nbytes, seconds)}


def _steps(trainee: Trainee, arguments: argparse.Namespace, count: int, phase: str) -> Iterator[dict[str, Any]]:
    import torch

    for _ in range(count):
        ids = torch.randint(0, trainee.model.config.vocab_size, (1, arguments.sequence))
        (loss, _), seconds = _timed(partial(trainee.step, ids))
        yield {"phase": phase, "seconds": seconds, "loss": round(float(loss), 4)}


def _beside(trainee: Trainee, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A save from copies in host memory: taking that, how long training stands still, steps meanwhile, all of it."""
    import torch

    from automodel.checkpoint import Saver

    device = next(trainee.model.parameters()).device
    with Saver("on", device, timedelta(seconds=arguments.limit)) as saver:
        state, write = _checkpoint(trainee, arguments)
        _, seconds = _timed(partial(_touch, _bytes_of(state) // torch.distributed.get_world_size()))
        yield {"phase": "touch host memory", "seconds": seconds}
        _, seconds = _timed(partial(saver.reserve, state))
        yield {"phase": "take host memory", "seconds": seconds}
        begun = time.perf_counter()
        _, seconds = _timed(partial(saver.save, arguments.scratch / "step", state, write))
        yield {"phase": "standing still", **_rate(_bytes_of(state), seconds)}
        yield from _steps(trainee, arguments, arguments.steps, "step beside the save")
        _timed(saver.wait)
        yield {"phase": "save beside steps", **_rate(_bytes_of(state), time.perf_counter() - begun)}


def _touch(nbytes: int) -> None:
    """Use so much host memory and give it back: a virtual machine may grow only then, and seem to have too little."""
    import torch

    torch.ones(nbytes, dtype=torch.uint8)


def _checkpoint(trainee: Trainee, arguments: argparse.Namespace) -> tuple[dict[str, Any], Callable[..., None]]:
    """What a checkpoint holds by name, and what writes it."""
    from automodel.checkpoint.save import save_checkpoint
    from automodel.checkpoint.state import model_state, optimizer_state

    state = model_state(trainee.model)
    if arguments.optimizer:
        state |= optimizer_state(trainee.model, trainee.optimizer)
    architecture = trainee.model.transformers_architecture
    config = {**CASES[arguments.case], "architectures": [architecture], "dtype": arguments.dtype}
    write = partial(
        save_checkpoint,
        arguments.scratch / "step",
        state,
        family=CASES[arguments.case]["model_type"],
        side_files={"config.json": json.dumps(config).encode()},
        source={"model": f"random weights of {arguments.case}"},
    )
    return state, write


def _bytes_of(state: dict[str, Any]) -> int:
    """Of whole tensors, which each process may hold a part of."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _timed(act: Callable[[], Any]) -> tuple[Any, float]:
    """What `act` returns, and its seconds from when all processes begin it until all have done it."""
    import torch
    import torch.distributed as dist

    def together() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()

    together()
    begun = time.perf_counter()
    result = act()
    together()
    return result, round(time.perf_counter() - begun, 3)


def _rate(nbytes: int, seconds: float) -> dict[str, Any]:
    return {
        "gb": round(nbytes / 1e9, 3),
        "seconds": round(seconds, 3),
        "gb_per_second": round(nbytes / seconds / 1e9, 3),
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'phase':24}{'GB':>9}{'s':>9}{'GB/s':>8}")
    for row in rows:
        if "error" in row:
            print(f"{row['phase']:24} {row['error'][-400:]}")
            continue
        print(f"{row['phase']:24}{row.get('gb', ''):>9}{row['seconds']:>9}{row.get('gb_per_second', ''):>8}")


if __name__ == "__main__":
    main()
