"""The storage reader that training resumes through: DCP's loading and resharding without running any pickle.

`.metadata` and the head of each tensor are parsed inertly by `ckpt_tools`, and only the rows that a rank needs are
read. It reads checkpoints of any DCP writer whose entries are tensors; other entries are left closed.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata, StorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from automodel.parallel.local import host_bytes
from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.errors import FormatError
from ckpt_tools.core.paths import open_input, safe_join
from ckpt_tools.engine.files import FileReader
from ckpt_tools.formats.dcp.blob import LocatedTensor, locate
from ckpt_tools.formats.dcp.description import parse
from ckpt_tools.formats.dcp.pickle_reader import MAX_PICKLE_SIZE
from ckpt_tools.formats.documents import read_whole

METADATA_FILE = ".metadata"


class InertReader(StorageReader):
    """Reads a DCP directory.

    Raises:
        NotFoundError: there is no `.metadata` in it.
        FormatError: `.metadata` is malformed, or asks for code to be run.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / METADATA_FILE
        self.description = parse(read_whole(path, MAX_PICKLE_SIZE), str(path))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.description.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return _torch_dtype(name, self.description.tensors[name].dtype)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """One reader reads one directory."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        for name, tensor in self.description.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in tensor.boxes]
            properties = TensorProperties(dtype=self.dtype(name))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        return Metadata(state_dict_metadata=tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Everything is known since the constructor."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each item's rows of its chunk into the tensor that the planner names.

        Raises:
            FormatError: a chunk is not what `.metadata` says.
            StorageError: a read failed, or a file ends early.
        """
        with FileReader(self.directory) as reader:
            for item in plan.items:
                source = self._read(reader, item)
                target = planner.resolve_tensor(item).detach()
                target.copy_(source)
                planner.commit_tensor(item, target)
            reader.check_unchanged()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()

    def _read(self, reader: FileReader, item: ReadItem) -> torch.Tensor:
        name = item.storage_index.fqn
        dtype = self.dtype(name)
        file, found = self._locate(item)
        if not found.sizes:
            scalar = torch.empty((), dtype=dtype)
            reader.read(file, found.position, host_bytes(scalar))
            return scalar
        first, count = item.storage_offsets[0], item.lengths[0]
        rows = torch.empty((count, *found.sizes[1:]), dtype=dtype)
        if rows.numel():
            row = prod(found.sizes[1:]) * found.dtype.itemsize
            reader.read(file, found.position + first * row, host_bytes(rows))
        for dim in range(1, rows.ndim):
            rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
        return rows

    def _locate(self, item: ReadItem) -> tuple[str, LocatedTensor]:
        """File and place of the stored chunk that `item` reads from."""
        name = item.storage_index.fqn
        offsets = tuple(item.storage_index.offset or ())
        location = self.description.locations.get((name, offsets))
        if location is None:
            raise FormatError(
                f"{self.directory / METADATA_FILE} does not say where {name} at {list(offsets)} is stored",
                hint="the job that saved the checkpoint did not finish",
            )
        path = safe_join(self.directory, location.file, named_by=str(self.directory / METADATA_FILE))
        fd = open_input(path, self.directory)
        try:
            found = locate(fd, location.position, location.length, path)
        finally:
            os.close(fd)
        expected = dict(self.description.tensors[name].boxes).get(offsets)
        if found.dtype is not self.description.tensors[name].dtype or found.sizes != expected:
            raise FormatError(
                f"{path}: {name} at {list(offsets)} is {found.dtype} {list(found.sizes)} there, and "
                f"{self.description.tensors[name].dtype} {list(expected or ())} in {METADATA_FILE}",
                hint="the files are of different checkpoints",
            )
        if found.strides is not None:
            raise FormatError(
                f"{path}: {name} is not stored row by row",
                hint="load this checkpoint with torch.distributed.checkpoint and save it again",
            )
        return location.file, found


def _torch_dtype(name: str, dtype: DType) -> torch.dtype:
    if dtype.torch_name is None:
        raise FormatError(f"{name} has the dtype {dtype}, which torch does not have")
    found: torch.dtype = getattr(torch, dtype.torch_name)
    return found
