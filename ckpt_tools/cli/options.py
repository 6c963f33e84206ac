"""Arguments and options that several verbs share, each declared once: its text, its example, its completion."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class FileFormat(str, Enum):
    """File formats of a native checkpoint."""

    DCP = "dcp"
    SAFETENSORS = "safetensors"


class QuantizedForm(str, Enum):
    """Quantised forms of a Hugging Face repository."""

    FP8 = "fp8"
    FP8_CHANNEL = "fp8-channel"
    MXFP4 = "mxfp4"


class Reflink(str, Enum):
    """Whether an output shares disk blocks with its source."""

    AUTO = "auto"
    NEVER = "never"
    ALWAYS = "always"


def complete_family(incomplete: str) -> list[str]:
    """Family names that begin with what was typed."""
    from ckpt_tools.families import FAMILIES

    return [name for name in (*FAMILIES, "identity") if name.startswith(incomplete)]


def complete_dialect(incomplete: str) -> list[str]:
    """Names of the dialects that begin with what was typed."""
    from ckpt_tools.families.dialects import DIALECTS, OURS

    return [name for name in (*OURS, *DIALECTS) if name.startswith(incomplete)]


def complete_dtype(incomplete: str) -> list[str]:
    """Names of the dtypes that tensors can be cast to, as torch spells them."""
    from ckpt_tools.core.dtypes import DTYPES

    names = (dtype.torch_name for dtype in DTYPES.values() if dtype.is_float and dtype.torch_name)
    return [name for name in names if name.startswith(incomplete)]


def complete_mesh(incomplete: str) -> list[str]:
    """The mesh so far with each axis that it does not have yet."""
    from ckpt_tools.engine.sharding import AXES

    done, comma, last = incomplete.rpartition(",")
    return [f"{done}{comma}{axis}=" for axis in AXES if axis.startswith(last) and f"{axis}=" not in done]


def complete_readers(incomplete: str) -> list[str]:
    """The readers so far with each one that is not named yet."""
    from ckpt_tools.families.readers import READERS

    done, comma, last = incomplete.rpartition(",")
    return [f"{done}{comma}{name}" for name in READERS if name.startswith(last) and name not in done.split(",")]


Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A directory, org/name, org/name@revision, hf://org/name, or a URL such as s3://bucket/name. "
        "Example: ./Qwen3-30B-A3B",
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(metavar="SRC", help="Directory or URL of a native checkpoint, or of a trainer's. Example: ./native"),
]
AnyCheckpoint = Annotated[
    str,
    typer.Argument(metavar="PATH", help="Any checkpoint: a repository, a native one, or one that training saved."),
]
Destination = Annotated[str, typer.Argument(metavar="DST", help="Directory to make. Example: ./out")]

Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="Lay the files out for the ranks of this mesh; any mesh can load any of them. Default: no mesh. "
        "Example: --mesh dp_shard=2,ep=4",
        autocompletion=complete_mesh,
    ),
]
Format = Annotated[
    FileFormat, typer.Option("--format", help="File format of a native checkpoint. Example: --format safetensors")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Cast floating-point tensors. Default: every tensor keeps its dtype. Example: --dtype bfloat16",
        autocompletion=complete_dtype,
    ),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        help="Turn FP8 and MXFP4 tensors into BF16, or into --dtype; a quantised source is refused without.",
    ),
]
Quantize = Annotated[
    QuantizedForm | None,
    typer.Option("--quantize", help="Write a quantised form that the family is published in. Example: mxfp4."),
]
Readers = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="READERS",
        help="Write what all of these readers accept, or refuse with the reason. Default: keep every name and field. "
        "Example: --for transformers4,vllm,sglang",
        autocompletion=complete_readers,
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        "--family",
        help="Family of the model; identity keeps all names. Default: read from config.json. Example: --family mixtral",
        autocompletion=complete_family,
    ),
]
Dialect = Annotated[
    str | None,
    typer.Option(
        "--dialect",
        help="Whose tensor names another trainer's checkpoint has. Default: found out from the names. "
        "Example: --dialect torchtitan",
        autocompletion=complete_dialect,
    ),
]
Like = Annotated[
    str | None,
    typer.Option(
        "--like",
        metavar="REPO",
        help="Repository of the same model, whose config.json and tokenizer belong to a checkpoint that has none. "
        "Default: the checkpoint's own. Example: --like Qwen/Qwen3-30B-A3B",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a Hub repository. Default: main. Example: --revision v2"),
]
MaxFileSize = Annotated[
    str, typer.Option("--max-file-size", help="Size of a file when no mesh is given. Example: --max-file-size 2GB")
]
MaxShardSize = Annotated[
    str, typer.Option("--max-shard-size", help="Size of a safetensors file. Example: --max-shard-size 10GB")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an existing output, which stays until the new one is whole."),
]
Sharing = Annotated[
    Reflink,
    typer.Option(
        "--reflink",
        help="Share disk blocks with the source in place of copying, where the file system can (XFS, Btrfs); always is "
        "an error where it cannot. Example: --reflink never",
    ),
]
Digests = Annotated[
    bool,
    typer.Option(
        "--digests",
        help="Read shared tensors, too, to check and record their digests. Default: those that the source's manifest "
        "records are taken over.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Worker threads. Default: one a core, 2 to 8. Example: --threads 4",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Bound of the copy buffers; fewer threads run when it is small. Default: 4 MiB a thread. "
        "Example: --memory 64MB",
    ),
]
Sha256 = Annotated[
    bool,
    typer.Option("--sha256", help="Write SHA256SUMS beside the files, for signing and sha256sum -c; reads them again."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Plan and prove from headers; write nothing.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there, errors included.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress, no hints, no summary of success; errors are still shown.")
]
