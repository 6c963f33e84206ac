"""Training steps of one model by several implementations, on the same weights, batches and machine, in one run.

    python benchmarks/training.py --case qwen3-30b-8l --implementations ours,transformers --micro-batches 1,4
    python benchmarks/training.py --case qwen3-30b --gpus 4 --micro-batches 1,2,4 --warmup 10 --profile
    python benchmarks/training.py --case qwen3-30b --gpus 4 --dry

A step is forward, backward, gradient clipping and AdamW with states in BF16, at sequence length 4,096, with the model's
own router. Every row of the table starts from the same random weights, made by each process on its own device, and an
empty optimizer, so that losses compare. Steps follow each other without a pause, and the time of one is that from the
end of the one before to its own end on the device; ours reads its loss in every step, the others only at the end. Every
implementation is a process of its own, or one for each GPU under torchrun: ours divides experts over `--ep` processes
and shards the rest by FSDP2, the others are sharded by FSDP2. `--dry` says what memory the run would need, then runs
the same code at tiny widths in FP32 over processes on CPUs, and fails where losses differ. Prints a table and writes
JSON with the whole configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import training_dry
import training_memory
import training_profile
from training_cases import CASES, OURS, PEAK_TFLOPS, flops_per_token

if TYPE_CHECKING:
    from training_trainee import Trainee

SEQUENCE = 4096
MINUTES = 10.0
"""After which a process that waits for another one gives up."""


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        for row in _rows(arguments):
            print("ROW " + json.dumps(row), flush=True)
        return
    if arguments.dry:
        training_memory.print_predictions(arguments, list(_runs(arguments)))
        training_dry.shrink(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for implementation, ep in _runs(arguments):
        rows += _measure(arguments, implementation, ep)
        document = {"configuration": _configuration(arguments), "rows": rows}
        path = arguments.out / f"training-{arguments.case}-{arguments.gpus}gpu{arguments.label}.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    _print_table(rows, arguments)
    if arguments.dry:
        training_dry.compare(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="qwen3-30b-8l")
    parser.add_argument("--implementations", default="transformers,transformers-compiled,ours")
    parser.add_argument("--micro-batches", default="1,4", help="4c, 4s: activation checkpointing, selective")
    parser.add_argument("--tokens", choices=("skewed", "even"), default="skewed", help="how often each of them comes")
    parser.add_argument("--sequence", type=int, default=SEQUENCE)
    parser.add_argument("--dtype", default="bfloat16", help="of parameters, gradients and optimizer states")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--gpus", type=int, default=1, help="processes, one for each GPU")
    parser.add_argument("--ep", default="", help="processes that divide our experts, all by default; 8,4: one by one")
    parser.add_argument("--profile", action="store_true", help="one step under torch's profiler; kernels into the JSON")
    parser.add_argument("--dry", action="store_true", help="tiny widths in FP32 on CPUs; compares the losses")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "benchmark-out")))
    parser.add_argument("--label", default="", help="what the name of the JSON ends with")
    parser.add_argument("--limit", type=float, default=400, help="seconds for one implementation")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _runs(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Each implementation with each size of `ep` that it has."""
    sizes = [int(size) for size in arguments.ep.split(",")] if arguments.ep else [arguments.gpus]
    for implementation in arguments.implementations.split(","):
        yield from ((implementation, ep) for ep in (sizes if implementation in OURS else [1]))


def _configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "case": arguments.case,
        "config": CASES[arguments.case],
        "sequence": arguments.sequence,
        "tokens": arguments.tokens,
        "dtype": f"{arguments.dtype} parameters, gradients and AdamW states",
        "clipping": True,
        "timing": "from the end of a step to that of the next one on the device, in a row",
        "lr": arguments.lr,
        "gpus": arguments.gpus,
        "gpu": _gpu(),
        "warmup": arguments.warmup,
        "steps": arguments.steps,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "kernel_packages": _kernel_packages(),
        "python": platform.python_version(),
        "flops_per_token": flops_per_token(CASES[arguments.case], arguments.sequence),
        "peak_tflops": _peak_tflops(),
    }


def _kernel_packages() -> dict[str, str]:
    """Installed packages that bring kernels -> their versions; transformers takes them, too."""
    from automodel.kernels.packages import KERNEL_PACKAGES
    from ckpt_tools.core.packages import look_for

    return {package.name: package.version for package in look_for(KERNEL_PACKAGES) if package.version}


@cache
def _gpu() -> str:
    """The name of the first GPU; asked for without a context on it, which would take its memory."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _peak_tflops() -> float | None:
    return next((rate for name, rate in PEAK_TFLOPS.items() if name in _gpu()), None)


def _measure(arguments: argparse.Namespace, implementation: str, ep: int) -> list[dict[str, Any]]:
    """Rows of one implementation, from processes of its own; an error becomes a row that says so."""
    if arguments.dry:
        child = argparse.Namespace(**{**vars(arguments), "child": implementation, "ep": str(ep)})
        return training_dry.forked(arguments.gpus, lambda: _rows(child))
    own = [Path(__file__).as_posix(), *sys.argv[1:], "--child", implementation, "--ep", str(ep)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.gpus}"]
    command = [sys.executable, *(launcher if arguments.gpus > 1 else []), *own]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit, check=False)
        output, errors, code = done.stdout, done.stderr, str(done.returncode)
    except subprocess.TimeoutExpired as late:
        output, errors, code = _text(late.stdout), _text(late.stderr), f"killed after {arguments.limit:g} s"
    (arguments.out / f"{implementation}-ep{ep}{arguments.label}.log").write_text(output + errors, encoding="utf-8")
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    if code != "0" and not any("error" in row for row in rows):
        rows.append({"implementation": implementation, "ep": ep, "error": f"exit {code}: {errors[-600:]}"})
    return rows


def _text(data: str | bytes | None) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data or ""


def _rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one implementation, on the first of its processes; all of them run this."""
    from training_trainee import build

    from automodel.training.processes import process_group

    with process_group(MINUTES) if arguments.gpus > 1 else nullcontext():
        trainee = build(arguments)
        yield from _rows_of(arguments, trainee)
        trainee.end()


def _rows_of(arguments: argparse.Namespace, trainee: Trainee) -> Iterator[dict[str, Any]]:
    import torch
    import torch.distributed as dist

    first = not dist.is_initialized() or dist.get_rank() == 0
    for text in arguments.micro_batches.split(","):
        size, checkpointing = training_memory.parsed(text)
        memory = training_memory.predicted(arguments, arguments.child, int(arguments.ep), text)
        described = {
            "implementation": arguments.child,
            "ep": int(arguments.ep),
            "micro_batch": size,
            "checkpointing": checkpointing,
            "predicted_gib": memory and training_memory.gib(memory.peak),
        }
        try:
            trainee.start_over(checkpointing=checkpointing)
            row = _time(arguments, trainee, size)
        except torch.cuda.OutOfMemoryError as error:
            if first:
                yield {**described, "error": f"out of memory: {str(error)[:80]}"}
            if dist.is_initialized():
                # The others wait for this one in a collective; torchrun ends them when it fails.
                raise
            torch.cuda.empty_cache()
            continue
        if first:
            yield {**described, **row}


def _time(arguments: argparse.Namespace, trainee: Trainee, size: int) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    rank = int(os.environ.get("RANK", "0"))
    generator = torch.Generator().manual_seed(1000 * size + rank)
    vocabulary = trainee.model.config.vocab_size

    def batch() -> torch.Tensor:
        if arguments.tokens == "even":
            return torch.randint(0, vocabulary, (size, arguments.sequence), generator=generator)
        # Few distinct tokens, unevenly: something to learn, and a router whose load is not even.
        ids = torch.empty(size, arguments.sequence).exponential_(3.0, generator=generator).mul(200).long()
        return ids.clamp(max=vocabulary - 1)

    batches = [batch() for _ in range(arguments.warmup + arguments.steps)]
    _synchronize()
    measured, marks = [], [_mark()]
    for ids in batches:
        measured.append(trainee.step(ids))
        marks.append(_mark())
    _synchronize()
    losses, norm = [_mean(loss) for loss, _ in measured], measured[-1][1]
    all_seconds = [_seconds(*pair) for pair in pairwise(marks)]
    seconds = all_seconds[arguments.warmup :]
    median = statistics.median(seconds)
    tokens = size * arguments.sequence
    flops = tokens / median * flops_per_token(CASES[arguments.case], arguments.sequence)
    peak = _peak_tflops()
    row = {
        "seconds": round(median, 5),
        "fastest": round(min(seconds), 5),
        "slowest": round(max(seconds), 5),
        "first_step_seconds": round(all_seconds[0], 2),
        "tokens_per_second_per_gpu": round(tokens / median),
        "model_tflops": round(flops / 1e12, 1),
        "mfu": round(flops / 1e12 / peak, 4) if peak else None,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else 0.0,
        "device_gib": round(_device_bytes() / 2**30, 1) if cuda else 0.0,
        "grad_norm": round(_number(norm), 4),
        "losses": [round(loss, 4) for loss in losses],
    }
    if arguments.profile and rank == 0 and cuda:
        row["kernels"] = training_profile.profile(trainee.step, batch(), _synchronize)
    elif arguments.profile:
        for _ in range(training_profile.STEPS):
            trainee.step(batch())
    return row


def _number(value: Any) -> float:
    from torch.distributed.tensor import DTensor

    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def _mean(loss: Any) -> float:
    """The mean over processes, each of which has as many tokens; ours has it already."""
    import torch
    import torch.distributed as dist

    total = torch.tensor(float(loss), dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return float(total)


def _device_bytes() -> int:
    """What is taken of this process's GPU: also by libraries, symmetric memory and what the allocator holds back."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def _mark() -> Any:
    """A moment: on the device the one in which all that has been launched is done."""
    import torch

    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _print_table(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    flops = flops_per_token(CASES[arguments.case], arguments.sequence)
    print(f"{flops / 1e9:.2f} GFLOP a token: 6 for each weight of a matrix that it meets, and causal attention")
    if peak := _peak_tflops():
        print(f"MFU = tokens/s/GPU x {flops / 1e9:.2f} GFLOP / {peak:g} TFLOP/s")
    header = f"{'implementation':28}{'ep':>3}{'mb':>4}{'ms':>9}{'tokens/s/GPU':>14}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>7}"
    print(header + f"{'predicted':>11}{'on GPU':>8}{'exposed ms':>12}{'idle ms':>9}  losses")
    for row in rows:
        size = f"{row.get('micro_batch', '')}{training_memory.suffix(row.get('checkpointing'))}"
        begin = f"{row['implementation']:28}{row.get('ep', ''):>3}{size:>4}"
        if "error" in row:
            print(f"{begin} {row['error'][-400:]}")
            continue
        spent = row.get("kernels", {})
        print(
            f"{begin}{row['seconds'] * 1e3:>9.1f}{row['tokens_per_second_per_gpu']:>14,}{row['model_tflops']:>9}"
            f"{_percent(row['mfu']):>7}{row['peak_gib']:>7}{row['predicted_gib'] or '':>11}{row['device_gib']:>8}"
            f"{spent.get('exposed_communication', ''):>12}{spent.get('idle', ''):>9}"
            f"  {row['losses'][0]} .. {row['losses'][-1]}"
        )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    main()
