"""Load a checkpoint with SGLang's real loader, model classes and ModelRunner on a CPU, and compare it with a reference.

Usage: python check_sglang.py CHECKPOINT REFERENCE; prints one JSON line. Server arguments, weight loader, model code,
KV cache, torch-native attention and native expert computation are SGLang's own; sglang_stubs.py and sglang_torch.py
say what is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from array import array
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sglang_stubs
import sglang_torch
import torch
from reader_check import Reference, Report, log_softmax, max_difference, run, tokenizer_agrees
from sglang.benchmark import one_batch
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs

FLAGS = {
    "--device": "cpu",
    "--dtype": "float32",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--mem-fraction-static": "0.12",
    "--max-total-tokens": "512",
    "--max-running-requests": "4",
    "--context-length": "128",
    "--skip-tokenizer-init": None,
    "--disable-radix-cache": None,
    "--disable-overlap-schedule": None,
}
PREFIXES = 6
"""How many prompt lengths are checked: each is one prefill, compared at its last position."""


def check(report: Report, checkpoint: Path, reference: Reference, options: dict[str, Any]) -> Report:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    replaced = sglang_torch.install(config["model_type"])
    runner = _model_runner(checkpoint, options)
    length = reference.input_ids.shape[1]
    want = reference.log_probabilities()
    compared = []
    for cut in sorted({int(cut) for cut in np.linspace(1, length, PREFIXES)}):
        next_tokens, logits, batch = runner.extend(_requests(reference.input_ids[:, :cut]))
        compared.append((log_softmax(logits.float().numpy()), want[:, cut - 1]))
        if cut == length and not replaced:
            greedy = _decode(runner, next_tokens, batch, reference.greedy.shape[1])
        runner.clear()
    if replaced:
        greedy = _prefill(runner, reference.input_ids, reference.greedy.shape[1])
    if sglang_stubs.CALLS:
        raise RuntimeError(f"the result went through stubs: {sorted(set(sglang_stubs.CALLS))}")
    return replace(
        report,
        loaded=True,
        max_abs_logprob_difference=max_difference(iter(compared)),
        greedy=greedy,
        greedy_equal=greedy == reference.greedy.tolist(),
        tokenizer_equal=tokenizer_agrees(checkpoint, reference),
    )


def _model_runner(checkpoint: Path, options: dict[str, Any]) -> one_batch._TorchBenchRunner:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    chosen = FLAGS | options
    flags = [part for flag, value in chosen.items() for part in ([flag] if value is None else [flag, value])]
    server = ServerArgs.from_cli_args(parser.parse_args(["--model-path", str(checkpoint), *flags]))
    server.resolve_once()
    one_batch._set_envs_and_config(server)
    ports = PortArgs.init_new(server)
    rank = one_batch.spawn_world_rank(server, tp_rank=0, pp_rank=0)
    one_batch.publish(server, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=rank, gpu_id=0))
    one_batch._init_process_global_configs()
    one_batch.get_tokenizer = lambda *_, **__: None  # --skip-tokenizer-init does not reach this helper
    runner, _ = one_batch.load_model(server, ports, 0, 0)
    return runner


def _requests(prompts: np.ndarray) -> list[one_batch.Req]:
    requests = []
    for index, prompt in enumerate(prompts.tolist()):
        request = one_batch.Req(
            rid=index,
            origin_input_text="",
            origin_input_ids=array("q", prompt),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=16),
        )
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        request.extend_end = len(prompt)
        requests.append(request)
    return requests


def _decode(
    runner: one_batch._TorchBenchRunner, first: torch.Tensor, batch: one_batch.ScheduleBatch, count: int
) -> list[list[int]]:
    tokens = [torch.as_tensor(first)]
    while len(tokens) < count:
        following, _ = runner.decode(tokens[-1], batch)
        tokens.append(torch.as_tensor(following))
    return torch.stack(tokens, dim=1).tolist()


def _prefill(runner: one_batch._TorchBenchRunner, prompts: np.ndarray, count: int) -> list[list[int]]:
    """Greedy tokens, each by a prefill of all that is before it."""
    tokens = prompts
    for _ in range(count):
        following, _, _ = runner.extend(_requests(tokens))
        tokens = np.concatenate([tokens, torch.as_tensor(following).numpy()[:, None]], axis=1)
        runner.clear()
    return tokens[:, prompts.shape[1] :].tolist()


if __name__ == "__main__":
    sys.exit(run(Report("sglang", version("sglang")), check))
