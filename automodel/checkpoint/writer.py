"""The storage writer that training saves through: what `torch.distributed.checkpoint.load` reads, and safer to write.

Differences from torch's own writer: tensor bytes lie on 4 KiB boundaries, an error in any thread fails the save
(torch's is lost with its thread, pytorch issue 191391), space is reserved before the first byte, host memory is bounded
whatever the size of a tensor, and each tensor's digest is taken while it is written.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from math import prod
from pathlib import Path
from threading import Event
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from automodel.parallel.local import host_bytes
from ckpt_tools.core.dtypes import BY_TORCH_NAME
from ckpt_tools.core.errors import CkptError, UsageError
from ckpt_tools.core.storage import storage_errors
from ckpt_tools.engine.files import FileWriter
from ckpt_tools.formats.dcp.blob import Frame, frame

PIECE_BYTES = 64 << 20
"""Bytes of a tensor that are in host memory at a time, for each thread."""

Blobs = dict[str, list[tuple[int, int, str]]]


@dataclass(frozen=True)
class BlobResult(WriteResult):
    """A written tensor, with where its bytes lie and their xxh3-128 digest."""

    position: int
    nbytes: int
    digest: str


class AlignedWriter(StorageWriter):
    """One `.distcp` file for each rank, in a directory that exists.

    Args:
        directory: shared by all ranks.
        threads: that copy tensors from the device, digest and write them.
        abandoned: set, it ends the writing with an error.

    Attributes:
        blobs: on the coordinator, after the save: [position, length, digest] of every tensor by file.
    """

    def __init__(self, directory: Path, *, threads: int = 4, abandoned: Event | None = None) -> None:
        self.directory = directory
        self.threads = threads
        self.abandoned = abandoned or Event()
        self.blobs: Blobs = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.directory = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The coordinator has no other duty here than `finish`."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"__{rank}_0.distcp") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors; any failure in any thread is raised here.

        Raises:
            StorageError: the operating system refused a write, or the disk is full.
            CkptError: the save was abandoned.
        """
        file: str = plan.storage_data
        frames: list[tuple[WriteItem, int, Frame]] = []
        end = 0
        for item in plan.items:
            framed = _frame_of(item, end)
            frames.append((item, end, framed))
            end = framed.end
        results: list[WriteResult] = []
        if frames:
            with FileWriter(self.directory) as writer, ThreadPoolExecutor(self.threads) as pool:
                writer.create(file, end)
                pending = [pool.submit(self._write, writer, file, planner, *entry) for entry in frames]
                results = [task.result() for task in pending]
                writer.sync()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    @torch.no_grad()
    def _write(
        self, writer: FileWriter, file: str, planner: SavePlanner, item: WriteItem, start: int, framed: Frame
    ) -> BlobResult:
        tensor = planner.resolve_data(item).detach()
        flat = tensor.contiguous().reshape(-1)
        digest = xxhash.xxh3_128()
        position = framed.data_position
        writer.write(file, start, memoryview(framed.prefix))
        for piece in flat.split(PIECE_BYTES // flat.element_size()):
            if self.abandoned.is_set():
                raise CkptError("the save was abandoned")
            data = host_bytes(piece.cpu())
            digest.update(data)
            writer.write(file, position, data)
            position += len(data)
        writer.write(file, position, memoryview(framed.suffix))
        return BlobResult(
            index=item.index,
            size_in_bytes=framed.end - start,
            storage_data=_StorageInfo(file, start, framed.end - start),
            position=framed.data_position,
            nbytes=flat.nbytes,
            digest=digest.hexdigest(),
        )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`, on the coordinator, after every rank has synced its file."""
        written = [result for rank in results for result in rank]
        metadata.storage_data = {result.index: result.storage_data for result in written}
        metadata.storage_meta = self.storage_meta()
        metadata.version = CURRENT_DCP_VERSION
        for result in written:
            blob = (result.position, result.nbytes, result.digest)
            self.blobs.setdefault(result.storage_data.relative_path, []).append(blob)
        path = self.directory / ".metadata"
        with storage_errors("write", path), open(path, "xb") as stream:
            pickle.dump(metadata, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()


class TensorPlanner(DefaultSavePlanner):
    """DCP's planner for a flat dictionary of tensors; a rank's empty part of a sharded tensor is not written.

    Args:
        copies: by name, what is written in place of this rank's elements; None writes these.
    """

    def __init__(self, copies: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=False)
        self._copies = copies

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        kept = [item for item in plan.items if not _is_empty_part(item)]
        self.plan = replace(plan, items=kept)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | BytesIO:
        if self._copies is not None:
            # Of a tensor, sharded or not, a rank has one part.
            return self._copies[write_item.index.fqn]
        return super().resolve_data(write_item)


def _is_empty_part(item: WriteItem) -> bool:
    return item.tensor_data is not None and prod(item.tensor_data.chunk.sizes) == 0 and prod(item.tensor_data.size) != 0


def _frame_of(item: WriteItem, position: int) -> Frame:
    if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
        raise UsageError(
            f"{item.index.fqn} is not a tensor", hint="the state of a checkpoint is tensors only; encode it as bytes"
        )
    dtype = str(item.tensor_data.properties.dtype).removeprefix("torch.")
    return frame(BY_TORCH_NAME[dtype], item.tensor_data.chunk.sizes, position)
