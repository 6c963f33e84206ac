"""What the functions of the API return."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckpt_tools.engine.describe import TensorGroup


@dataclass(frozen=True)
class CopyReport:
    """What a conversion or consolidation did, or would do.

    Attributes:
        source: directory that was read.
        destination: directory that was made; None for a dry run.
        family: name of the family, `identity` where names stay as they are.
        source_side: `hf` or `native`.
        dialect: whose names the source's tensors have: `hf`, `native`, or another trainer's, such as `torchtitan`.
        prefix: what those names begin with beside the model's own, such as `model.`.
        target_side: `hf` or `native`.
        tensors: number of Hugging Face tensors that were moved.
        nbytes: bytes of all files with tensors.
        files: number of files with tensors.
        casts: number of tensors whose dtype changed by a cast.
        dequantized: number of tensors that were stored quantised and are plain now.
        quantized: number of tensors that are stored quantised now.
        rounded: number of those that do not read back bit for bit as the values that they were made of; 0 for a dry
            run, which reads none.
        shared: bytes of tensors that share their disk blocks with the source.
        undigested: number of tensors for which the manifest has no digest: they are shared, and the source records
            none.
        dropped: names that were left out on purpose, with the reason.
        skipped: number of entries that are not weights of the model (optimizer state, byte blobs).
        unchecked: why the source's digests were not compared on the way, in words; empty where they were, or where it
            has none.
        memory: upper bound of the buffers in bytes.
        threads: worker threads.
        ranks: processes that shared the work; `memory` and `threads` are those of each.
        seconds: wall time, planning included.
    """

    source: str
    destination: str | None
    family: str
    source_side: str
    dialect: str
    prefix: str
    target_side: str
    tensors: int
    nbytes: int
    files: int
    casts: int
    dequantized: int
    quantized: int
    rounded: int
    shared: int
    undigested: int
    dropped: dict[str, str]
    skipped: int
    unchecked: str
    memory: int
    threads: int
    ranks: int
    seconds: float


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` checked; reaching it means that every check passed."""

    path: str
    family: str
    side: str
    dialect: str
    tensors: int
    elements: int
    nbytes: int
    checks: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class RoundtripReport:
    """A checkpoint converted, consolidated and found equal bit for bit."""

    source: str
    family: str
    tensors: int
    nbytes: int
    convert_seconds: float
    consolidate_seconds: float
    verify_seconds: float


@dataclass(frozen=True)
class InspectReport:
    """What a checkpoint holds, from its headers."""

    path: str
    format: str
    family: str
    side: str
    dialect: str
    prefix: str
    tensors: int
    parameters: int
    nbytes: int
    files: dict[str, int]
    groups: tuple[TensorGroup, ...]
    skipped: dict[str, str]
    dropped: tuple[str, ...]
    side_files: tuple[str, ...]
    manifest: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FamilyReport:
    """One supported family; `data_only` ones have no native model and train through transformers' class, `dialects`
    are those of other trainers whose checkpoints are read."""

    name: str
    title: str
    architecture: str
    model_types: tuple[str, ...]
    data_only: bool
    rules: tuple[tuple[str, str], ...]
    dialects: tuple[str, ...] = ()
