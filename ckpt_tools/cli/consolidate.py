"""`ckpt consolidate`: native or training checkpoint -> Hugging Face repository."""

from __future__ import annotations

from ckpt_tools.cli import options
from ckpt_tools.cli.ranks import output, sharing

EXAMPLES = (
    "ckpt consolidate ./native ./Qwen3-30B-A3B-tuned",
    "ckpt consolidate ./runs/tuned/step-1000 ./published --dtype bfloat16 --max-shard-size 10GB",
    "ckpt consolidate ./runs/tuned/step-1000 ./published --quantize mxfp4",
    "ckpt consolidate ./native ./published --for vllm,sglang",
    "ckpt consolidate ./torchtitan/step-1000 ./published --like Qwen/Qwen3-30B-A3B",
    "ckpt consolidate ./native ./published --sha256",
    "torchrun --nproc-per-node 4 -m ckpt_tools consolidate ./native ./published",
)


def consolidate(
    source: options.Checkpoint,
    destination: options.Destination,
    readers: options.Readers = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    family: options.Family = None,
    dialect: options.Dialect = None,
    like: options.Like = None,
    max_shard_size: options.MaxShardSize = "5GB",
    overwrite: options.Overwrite = False,
    reflink: options.Sharing = options.Reflink.AUTO,
    digests: options.Digests = False,
    threads: options.Threads = None,
    memory: options.Memory = None,
    sha256: options.Sha256 = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a Hugging Face repository out of a native checkpoint.

    Or out of what training saved: DCP and sharded safetensors of torchtitan, accelerate, TRL, axolotl, NeMo AutoModel
    and others, told apart by their names. transformers 4 and 5, vLLM and SGLang load the result; the tokenizer's files
    are the source's, or --like's, byte for byte. A rerun after an interruption goes on where it stopped.
    """
    from ckpt_tools import api
    from ckpt_tools.cli.copying import copy_lines, next_step

    out = output(json, quiet)
    with out.progress() as progress, sharing(destination, alone=dry_run) as ranks:
        report = api.consolidate(
            source,
            destination,
            readers=readers,
            dtype=dtype,
            quantize=quantize.value if quantize else None,
            family=family,
            dialect=dialect,
            like=like,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            reflink=reflink.value,
            digests=digests,
            threads=threads,
            memory=memory,
            sha256=sha256,
            dry_run=dry_run,
            progress=progress,
            ranks=ranks,
        )
    out.done(report, copy_lines(report))
    out.hint(next_step(report, source, like))
