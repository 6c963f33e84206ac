"""Opens a DCP checkpoint: the tensors of the model and the place of every chunk, without running or loading anything.

Everything is checked before the first tensor byte is read: names, places, file sizes, that chunks tile each tensor,
and that each chunk's archive holds what the description says. Optimizer state and pickled objects are left closed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from ckpt_tools.core.dtypes import DType
from ckpt_tools.core.errors import FormatError, NotFoundError, listed
from ckpt_tools.core.paths import close_input, open_input, safe_join
from ckpt_tools.core.tensors import Checksum, Chunk, Store, StoredTensor, row_major
from ckpt_tools.formats.dcp.blob import LocatedTensor, locate
from ckpt_tools.formats.dcp.description import DescribedTensor, Description, Location, parse
from ckpt_tools.formats.dcp.pickle_reader import MAX_PICKLE_SIZE
from ckpt_tools.formats.dcp.strided import true_boxes
from ckpt_tools.formats.documents import read_whole
from ckpt_tools.formats.tiling import Box, check, find_fault

METADATA_FILE: Final = ".metadata"
BLOB_REASON: Final = "a pickled object; never opened"
OPTIMIZER_REASON: Final = "optimizer state"
RUN_REASON: Final = "state of the training run"
EXTRA_REASON: Final = "state of a kernel library"
_OPTIMIZER_ROOT: Final = re.compile(r"(?:optimizer|optim)s?(?:_states?|_\d+)?")
_OPTIMIZER_LEAVES: Final = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "acc_delta", "grad_avg"}
)
_RUN_ROOTS: Final = frozenset(
    {"train_state", "lr_scheduler", "lr_schedulers", "scheduler", "schedulers", "dataloader", "rng", "rng_state"}
    | {"extra_state", "seed", "step", "steps_run", "global_step", "epoch", "epochs_run", "total_epochs"}
    | {"max_steps_per_epoch"}
)
"""Keys under which trainers keep tensors of the run."""


def open_dcp(root: Path) -> Store:
    """The checkpoint in the directory `root`; names are those of the saved state dict.

    Raises:
        NotFoundError: there is no `.metadata`.
        FormatError: the description asks for code, leaves the directory, or does not match the files; missing files
            and chunks are listed together.
    """
    path = root / METADATA_FILE
    description = parse(read_whole(path, MAX_PICKLE_SIZE), str(path))
    skipped = dict.fromkeys(description.blobs, BLOB_REASON)
    model: dict[str, DescribedTensor] = {}
    for name, tensor in description.tensors.items():
        reason = _reason_to_skip(name)
        if reason is None:
            model[name] = tensor
        else:
            skipped[name] = reason
    pieces = [piece for name, tensor in model.items() for piece in _pieces(root, name, tensor, description)]
    files = _check_files(root, pieces)
    chunks: dict[str, list[Chunk]] = {name: [] for name in model}
    checksums = []
    for piece, found in _locate_all(root, pieces):
        chunks[piece.name] += _chunks(piece, found)
        if found.storage.crc:
            checksums.append(Checksum(piece.name, piece.location.file, *found.storage))
    tensors = {name: StoredTensor(name, t.dtype, t.shape, tuple(chunks[name])) for name, t in model.items()}
    roots = {description.roots.get(name, "") for name in model}
    nested = roots.pop() if len(roots) == 1 else ""
    return Store(root, "dcp", tensors, files, skipped, nested=nested, checksums=tuple(checksums))


def _reason_to_skip(name: str) -> str | None:
    """Why an entry is no weight of the model, by its name; None where it is one."""
    parts = name.split(".")
    # A trainer that is saved as one object has its optimizer one part further in.
    if any(map(_OPTIMIZER_ROOT.fullmatch, parts[:2])) or parts[-1] in _OPTIMIZER_LEAVES:
        return OPTIMIZER_REASON
    if parts[0] in _RUN_ROOTS:
        return RUN_REASON
    return EXTRA_REASON if parts[-1] == "_extra_state" else None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stored chunk: the box it is described as, and the boxes of the tensor that lie in it one after another."""

    name: str
    dtype: DType
    sizes: tuple[int, ...]
    boxes: tuple[Box, ...]
    cut: int
    location: Location


def _pieces(root: Path, name: str, tensor: DescribedTensor, description: Description) -> list[_Piece]:
    """The chunks of a tensor that have elements, proven to tile it."""
    source = str(root / METADATA_FILE)
    full = [box for box in tensor.boxes if 0 not in box[1]]
    boxes: dict[Box, tuple[Box, ...]] = {box: (box,) for box in full}
    cut = 0
    if find_fault(tensor.shape, full) is not None:
        repaired = true_boxes(tensor.shape, full)
        if repaired is None:
            check(name, tensor.shape, full, source)
        else:
            cut, boxes = repaired
    pieces, missing = [], []
    for (offsets, sizes), parts in boxes.items():
        location = description.locations.get((name, offsets))
        if location is None:
            missing.append(f"{name} at {list(offsets)} of size {list(sizes)}")
        else:
            pieces.append(_Piece(name, tensor.dtype, sizes, parts, cut, location))
    if missing:
        raise FormatError(
            f"{source} does not say where these chunks are stored\n{listed(missing)}",
            hint="the job that saved the checkpoint did not finish",
        )
    return pieces


def _check_files(root: Path, pieces: Sequence[_Piece]) -> dict[str, int]:
    """The size of each file; raises one error for all that are missing or too short."""
    sizes: dict[str, int] = {}
    faults: dict[str, None] = {}
    for piece in pieces:
        file = piece.location.file
        if file not in sizes:
            path = safe_join(root, file, named_by=str(root / METADATA_FILE))
            try:
                sizes[file] = _size(path, root)
            except NotFoundError:
                sizes[file] = -1
        if sizes[file] < 0:
            faults[f"{file}: does not exist"] = None
        elif piece.location.position + piece.location.length > sizes[file]:
            faults[f"{file}: has {sizes[file]:,} bytes and is described as longer"] = None
    if not faults:
        faults = dict.fromkeys(_overlaps(pieces))
    if faults:
        raise FormatError(
            f"{root} is not a whole checkpoint\n{listed(faults, 20)}",
            hint="copy the missing files again, or use another step's checkpoint",
        )
    return sizes


def _overlaps(pieces: Sequence[_Piece]) -> Iterator[str]:
    """Chunks that are said to lie in each other's bytes: no program saves so."""
    ordered = sorted(pieces, key=lambda p: (p.location.file, p.location.position))
    for one, other in pairwise(ordered):
        place = one.location
        if other.location.file == place.file and other.location.position < place.position + place.length:
            yield f"{place.file}: {other.name} is said to begin inside {one.name}, at byte {other.location.position:,}"


def _size(path: Path, root: Path) -> int:
    fd = open_input(path, root)
    try:
        return os.fstat(fd).st_size
    finally:
        close_input(fd, path)


def _locate_all(root: Path, pieces: Sequence[_Piece]) -> list[tuple[_Piece, LocatedTensor]]:
    """Where each piece lies, in the order given. One file is open at a time: some jobs write a file for each tensor."""
    by_file: dict[str, list[int]] = {}
    for i, piece in enumerate(pieces):
        by_file.setdefault(piece.location.file, []).append(i)
    found: dict[int, LocatedTensor] = {}
    for file, members in by_file.items():
        path = safe_join(root, file, named_by=str(root / METADATA_FILE))
        fd = open_input(path, root)
        try:
            for i in members:
                found[i] = _locate(fd, path, pieces[i])
        finally:
            close_input(fd, path)
    return [(piece, found[i]) for i, piece in enumerate(pieces)]


def _locate(fd: int, path: Path, piece: _Piece) -> LocatedTensor:
    found = locate(fd, piece.location.position, piece.location.length, path)
    if found.dtype is not piece.dtype or found.sizes != piece.sizes:
        raise FormatError(
            f"{path}: the bytes at {piece.location.position:,} hold {found.dtype} {list(found.sizes)}, "
            f"described as {piece.dtype} {list(piece.sizes)} of {piece.name!r}",
            hint="the files are of different saves",
        )
    return found


def _chunks(piece: _Piece, found: LocatedTensor) -> Iterator[Chunk]:
    """The boxes of one stored piece with their positions."""
    if len(piece.boxes) == 1:
        ((offsets, sizes),) = piece.boxes
        yield Chunk(offsets, sizes, piece.location.file, found.position, found.strides)
        return
    strides = found.strides or row_major(found.sizes)
    position = found.position
    for offsets, sizes in piece.boxes:
        yield Chunk(offsets, sizes, piece.location.file, position, strides)
        position += sizes[piece.cut] * strides[piece.cut] * piece.dtype.itemsize
