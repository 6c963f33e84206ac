"""What was measured to be faster than what: the numbers behind `backend="auto"`, and where each comes from.

All are times of forward and backward in BF16 on one H200, with torch 2.11 and CUDA 13.0, from `benchmarks/te.py` and
`benchmarks/results/te.json` (TransformerEngine 2.20.2) where nothing else is said.
"""

from __future__ import annotations

from typing import NamedTuple

from automodel.kernels.te import LinearKernel

ATTENTION = {
    "flash4": 0.93,  # 3.69 ms, cuDNN 3.98 ms: 4 rows of 4,096 tokens, 32 query and 4 key heads of 128
    "cudnn": 1.00,
    "te": 1.00,  # 1.965 ms, cuDNN 1.970 ms: 2 such rows
    "flash": 1.91,  # torch's: 3.768 ms
}
"""Causal attention over whole rows, over the time of cuDNN's. `te` is cuDNN's kernel too, and has packed documents:
1.856 ms for 1000, 3000, 96 and 4096 tokens with these heads, where torch's kernels document by document take 2.995; and
windows of 128 tokens in 64 heads of 64, within a CUDA graph 0.664 ms where torch's take 0.884, launched one by one
0.970 and 0.897."""

FP8_WINS: dict[LinearKernel, tuple[tuple[int, int, int], ...]] = {
    # rows, and the smaller and the larger side of the weight: milliseconds in FP8, in BF16
    "fp8": (
        (16_384, 2048, 6144),  # 1.330, 1.618
        (16_384, 4096, 4096),  # 1.661, 2.204
        (8192, 4096, 6144),  # 1.288, 1.630
    ),
    "fp8_block": (
        (16_384, 2048, 6144),  # 1.538, 1.618
        (16_384, 4096, 4096),  # 1.967, 2.204
        (8192, 4096, 6144),  # 1.464, 1.630
    ),
}
"""The smallest linear layers that were faster in FP8 than in BF16, launched one by one; (8192, 2048, 6144) and (8192,
4096, 4096) lose so, and win within a CUDA graph. In BF16 TransformerEngine's products take as long as torch's (1.6 and
1.6 ms at the first of these sizes), its grouped products twice to three times as long. Its RMSNorm takes 0.285 ms where
torch's takes 0.125 (8192 x 2048), because of the host: within a CUDA graph 0.056 and 0.092, where layers are compiled
and torch's norm is fused with what surrounds it."""


class Tile(NamedTuple):
    """What a block of QuACK's computes at once, and whether its two groups of warps take such tiles in turn
    (`alternating`) or half of each."""

    rows: int
    columns: int
    alternating: bool


TILE = Tile(128, 192, alternating=True)
"""Of QuACK's products of rows: on average up to 4 % slower than the fastest cut of a product, over the experts of
Qwen3-30B-A3B, GPT-OSS-20B and Nemotron-3-Nano with 192 to 1,024 rows each, unevenly, where QuACK's default takes 4 to
15 % longer and torch 29 to 40 % (`benchmarks/grouped_products.py`, quack-kernels 0.6.5).

Its products can gather tokens, too, which pays in none: with 256 rows an expert of Qwen3-30B-A3B the first product then
takes 0.50 ms, where writing tokens as rows takes 0.04 and their product 0.40; with 1,024 1.40, and 0.16 and 1.23."""


def by_speed(*kernels: str) -> list[str]:
    """Attention kernels, the fastest first; of equals the one that is named first."""
    return sorted(kernels, key=ATTENTION.__getitem__)


def fp8_rows(kernel: LinearKernel, values_in: int, values_out: int) -> int | None:
    """The fewest tokens from which on a linear layer pays in FP8, None where it is narrower than all that were measured
    to: a layer no larger in any of its three sizes won."""
    narrow, wide = sorted((values_in, values_out))
    enough = [rows for rows, least, most in FP8_WINS[kernel] if narrow >= least and wide >= most]
    return min(enough, default=None)


def fp8_narrowest(kernel: LinearKernel) -> str:
    """The smallest weights that won, in words."""
    least = {(narrow, wide) for _, narrow, wide in FP8_WINS[kernel]}
    minimal = [a for a in least if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in least)]
    return " or ".join(f"{narrow} x {wide}" for narrow, wide in sorted(minimal))
