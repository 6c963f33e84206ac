"""Which box of a native tensor each rank of a training mesh holds, without torch.

With experts divided (`ep` above 1), expert tensors are sharded by experts (dim 0) over `ep` and by rows (dim 1) over
`dp_shard`; every other tensor is sharded by dim 0 over the two axes flattened. Chunks are torch's: `ceil(n / parts)`
indices each, the last ones shorter or empty (`torch.chunk`, `DTensor`'s `Shard`), so that a rank of a job on that mesh
finds its part in one file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckpt_tools.core.errors import UsageError
from ckpt_tools.core.names import nearest

AXES = ("dp_shard", "ep")


@dataclass(frozen=True)
class ShardingMesh:
    """Sizes of the mesh axes that split parameters."""

    dp_shard: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        return self.dp_shard * self.ep

    def __str__(self) -> str:
        return f"dp_shard={self.dp_shard},ep={self.ep}"


def parse_mesh(text: str) -> ShardingMesh:
    """A mesh from text such as `dp_shard=2,ep=4`.

    Raises:
        UsageError: an axis is unknown or its size is not a positive number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise UsageError(
                f"--mesh {text!r}: there is no axis {axis!r}",
                hint=f"did you mean {nearest(axis, AXES) or ' or '.join(AXES)}? example: --mesh dp_shard=2,ep=4",
            )
        if not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--mesh {text!r}: the size of {axis} is {size!r}, not a positive number")
        sizes[axis] = int(size)
    return ShardingMesh(**sizes)


def shard_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """(first, last + 1) index of part `index` when `size` indices are split into `parts` as torch does."""
    step = -(-size // parts)
    return min(size, step * index), min(size, step * (index + 1))


def boxes(
    shape: tuple[int, ...], mesh: ShardingMesh, *, stacked: bool
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(rank, offsets, sizes) of each rank's part of a tensor; ranks with an empty part are left out.

    Args:
        shape: of the whole tensor.
        mesh: the mesh; rank numbers run over `dp_shard`, then `ep`, the last fastest.
        stacked: the tensor is stacked over experts.
    """
    if not shape:
        yield 0, (), ()
        return
    zeros, rest = (0,) * len(shape), shape[1:]
    for rank in range(mesh.ranks):
        if stacked and mesh.ep > 1:
            row, expert = divmod(rank, mesh.ep)
            low, high = shard_range(shape[0], mesh.ep, expert)
            top, bottom = shard_range(shape[1], mesh.dp_shard, row)
            box = (low, top, *zeros[2:]), (high - low, bottom - top, *shape[2:])
        else:
            low, high = shard_range(shape[0], mesh.ranks, rank)
            box = (low, *zeros[1:]), (high - low, *rest)
        if all(box[1]) or (rank == 0 and not all(shape)):
            yield rank, *box
