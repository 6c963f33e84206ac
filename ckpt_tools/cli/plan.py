"""`ckpt plan`: what a conversion or consolidation would do, proven from headers."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from ckpt_tools.cli import options
from ckpt_tools.cli.output import Output

EXAMPLES = (
    "ckpt plan ./Qwen3-30B-A3B --mesh dp_shard=2,ep=4",
    "ckpt plan ./native --to hf --max-file-size 10GB",
)


class Side(str, Enum):
    """The two sides of a layout."""

    NATIVE = "native"
    HF = "hf"


def plan(
    source: options.Source,
    to: Annotated[
        Side | None,
        typer.Option("--to", help="Side to plan for. Default: the one that the source is not. Example: --to hf"),
    ] = None,
    mesh: options.Mesh = None,
    file_format: options.Format = options.FileFormat.DCP,
    dtype: options.Dtype = None,
    dequantize: options.Dequantize = False,
    quantize: options.Quantize = None,
    readers: options.Readers = None,
    family: options.Family = None,
    dialect: options.Dialect = None,
    like: options.Like = None,
    revision: options.Revision = None,
    max_file_size: options.MaxFileSize = "5GB",
    reflink: options.Sharing = options.Reflink.AUTO,
    digests: options.Digests = False,
    memory: options.Memory = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what convert or consolidate would do; write nothing.

    Reads headers only, and proves from them that every byte of the output would be written exactly once.
    """
    from ckpt_tools import api
    from ckpt_tools.cli.copying import copy_lines, next_step

    out = Output(json, quiet)
    report = api.plan(
        source,
        to=None if to is None else to.value,
        mesh=mesh,
        file_format=file_format.value,
        dtype=dtype,
        dequantize=dequantize,
        quantize=quantize.value if quantize else None,
        readers=readers,
        family=family,
        dialect=dialect,
        like=like,
        revision=revision,
        max_file_size=max_file_size,
        reflink=reflink.value,
        digests=digests,
        memory=memory,
        threads=threads,
    )
    out.show(report, copy_lines(report))
    out.hint(next_step(report, source))
