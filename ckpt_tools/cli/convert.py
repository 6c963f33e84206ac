"""`ckpt convert`: Hugging Face repository -> native checkpoint, or native -> native for another mesh."""

from __future__ import annotations

from ckpt_tools.cli import options
from ckpt_tools.cli.ranks import output, sharing

EXAMPLES = (
    "ckpt convert ./Qwen3-30B-A3B ./native",
    "ckpt convert Qwen/Qwen3-30B-A3B@main ./native --mesh dp_shard=2,ep=4 --dtype bfloat16",
    "ckpt convert ./native ./native-ep8 --mesh ep=8",
    "ckpt convert openai/gpt-oss-20b ./native --dequantize",
    "ckpt convert s3://bucket/Qwen3-30B-A3B ./native",
    "torchrun --nproc-per-node 4 -m ckpt_tools convert ./Qwen3-30B-A3B ./native",
)


def convert(
    source: options.Source,
    destination: options.Destination,
    mesh: options.Mesh = None,
    file_format: options.Format = options.FileFormat.DCP,
    dtype: options.Dtype = None,
    dequantize: options.Dequantize = False,
    family: options.Family = None,
    dialect: options.Dialect = None,
    like: options.Like = None,
    revision: options.Revision = None,
    max_file_size: options.MaxFileSize = "5GB",
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
    """Make a native checkpoint out of a Hugging Face repository.

    Training loads it on any mesh, and so does torch.distributed.checkpoint. The source can be a native checkpoint too,
    whose files are then laid out for another mesh. A rerun after an interruption goes on where it stopped.
    """
    from ckpt_tools import api
    from ckpt_tools.cli.copying import copy_lines, next_step

    out = output(json, quiet)
    with out.progress() as progress, sharing(destination, alone=dry_run) as ranks:
        report = api.convert(
            source,
            destination,
            mesh=mesh,
            file_format=file_format.value,
            dtype=dtype,
            dequantize=dequantize,
            family=family,
            dialect=dialect,
            like=like,
            revision=revision,
            max_file_size=max_file_size,
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
