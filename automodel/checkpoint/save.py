"""Saving a checkpoint from all ranks: complete and synced under its final name, or not there at all.

Every rank writes its own tensors into a staging directory beside the final one; only when all have synced does the
first rank add config and tokenizer (`hf/`) and the manifest, and rename it. An error on one rank is raised on all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash

from automodel.checkpoint.collective import dcp_call
from automodel.checkpoint.directory import remove_old
from automodel.checkpoint.writer import AlignedWriter, TensorPlanner
from automodel.parallel.agree import raise_together
from ckpt_tools.engine.manifest import MANIFEST, Manifest
from ckpt_tools.engine.staging import Staging
from ckpt_tools.families.family import LAYOUT_VERSION
from ckpt_tools.layouts.layout import Side
from ckpt_tools.version import TOOL


@dataclass(frozen=True)
class Background:
    """What a save needs in order to run in a thread beside training.

    Attributes:
        copies: by name, what this process holds of each tensor of the state; it is written in place of the state's own
            elements, which training goes on to change.
        group: of all processes, for this save alone; None where there is no process group.
        abandoned: set, it ends the save with an error.
    """

    copies: Mapping[str, torch.Tensor]
    group: dist.ProcessGroup | None
    abandoned: Event


def save_checkpoint(
    directory: Path,
    state: Mapping[str, torch.Tensor],
    *,
    family: str,
    side: Side = "native",
    side_files: Mapping[str, bytes],
    source: Mapping[str, str],
    keep_last: int | None = None,
    threads: int = 4,
    background: Background | None = None,
) -> None:
    """Write `state` as the checkpoint `directory`, which all ranks share. All ranks call it together.

    Args:
        directory: final path; one that exists is replaced when the new one is complete.
        state: tensors and DTensors by name; entries that all ranks have as plain tensors are written by one.
        family: of the model's layout, for the manifest.
        side: of that layout, whose names the model's tensors have.
        side_files: config, tokenizer and so on by relative path, written byte for byte into `hf/`.
        source: where the model came from, for the manifest.
        keep_last: delete all but the newest so many checkpoints beside `directory`; None keeps all.
        threads: writer threads of each rank.
        background: None where training waits for the save.

    Raises:
        StorageError: a rank could not write; nothing is left behind, and an older checkpoint is as it was.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    group = None if background is None else background.group
    with raise_together("finding the checkpoint directory", group):
        staging = Staging(directory, overwrite=True)
    entered = False
    try:
        with raise_together("preparing the checkpoint directory", group):
            if first:
                staging.__enter__()
                entered = True
                # What a killed save left here is of no use: its tensors are gone.
                staging.restart()
        writer = AlignedWriter(staging.path, threads=threads, abandoned=background and background.abandoned)
        planner = TensorPlanner(background and background.copies)
        with dcp_call(f"saving {directory}") as no_dist:
            dcp.save(dict(state), storage_writer=writer, planner=planner, process_group=group, no_dist=no_dist)
        with raise_together("completing the checkpoint", group):
            if first:
                manifest = Manifest(family, LAYOUT_VERSION, side, TOOL, source=dict(source), blobs=writer.blobs)
                for name, data in side_files.items():
                    staging.write_document(f"hf/{name}", data)
                    manifest.side_files[f"hf/{name}"] = xxhash.xxh3_128_hexdigest(data)
                staging.write_document(MANIFEST, manifest.to_json())
                staging.commit()
                if keep_last is not None:
                    remove_old(directory.parent, keep_last)
    finally:
        if entered:
            # After the commit there is nothing under the staging name any more.
            staging.discard()
            staging.__exit__()
