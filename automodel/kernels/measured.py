"""What was measured to be faster than what: the numbers behind `backend="auto"`, and where each comes from.

All are times of forward and backward in BF16 on one H200, with torch 2.11 and CUDA 13.0. Those of TransformerEngine are
of its own modules, not yet of our calls, which `benchmarks/te.py` measures.
"""

from __future__ import annotations

from automodel.kernels.te import LinearKernel

ATTENTION = {
    "flash4": 0.93,  # 3.69 ms, cuDNN 3.98 ms: 4 rows of 4,096 tokens, 32 query and 4 key heads of 128
    "cudnn": 1.00,
    "te": 1.10,  # TransformerEngine 2.20.2: 2.126 ms, cuDNN 1.938 ms: 2 such rows
    "flash": 1.69,  # torch's: 6.74 ms, cuDNN 3.98 ms: 4 such rows
}
"""Causal attention over whole rows, over the time of cuDNN's. `te` is cuDNN's kernel too, and has packed documents:
1.909 ms for 1000, 3000, 96 and 4096 tokens with these heads, where torch's kernels document by document take 2.855."""

FP8_WINS: dict[LinearKernel, tuple[tuple[int, int, int], ...]] = {
    # rows, and the smaller and the larger side of the weight
    "fp8": ((16_384, 4096, 12_288),),  # 4.346 ms, BF16 7.159; at (8192, 2048, 6144) it loses: 1.107 and 0.828
    "fp8_block": (),  # at (8192, 2048, 6144) it loses: 1.250 and 0.788; nothing larger has been measured
}
"""The smallest linear layers that were faster in FP8 than in BF16 (TransformerEngine 2.20.2). In BF16 its products take
as long as torch's (0.826 and 0.878 ms), its RMSNorm longer (0.379 and 0.130 ms for 8192 x 2048), and its grouped
products several times as long (2.289 and 0.575 ms for 16 experts, 16384 x 2048 -> 1536)."""


def by_speed(*kernels: str) -> list[str]:
    """Attention kernels, the fastest first."""
    return sorted(kernels, key=ATTENTION.__getitem__)


def fp8_rows(kernel: LinearKernel, values_in: int, values_out: int) -> int | None:
    """The fewest tokens from which on a linear layer pays in FP8, None where it is narrower than all that were measured
    to: a layer no larger in any of its three sizes won."""
    narrow, wide = sorted((values_in, values_out))
    enough = [rows for rows, least, most in FP8_WINS[kernel] if narrow >= least and wide >= most]
    return min(enough, default=None)


def fp8_narrowest(kernel: LinearKernel) -> str:
    """The smallest weights that won, in words."""
    return " or ".join(f"{narrow} x {wide}" for _, narrow, wide in FP8_WINS[kernel])
