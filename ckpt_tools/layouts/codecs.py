"""Value-changing forms of a leaf: FP8 in blocks of 128x128, FP8 with one scale a tensor, and MXFP4.

A codec turns the stored tensors of a quantised leaf into its values and back, for any whole rows of blocks, given where
they lie in the whole tensor: results do not depend on how a tensor is sharded or cut. Decoding is a table look-up, so
it runs at a good part of the speed of copying.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Words = NDArray[np.uint16]
    Floats = NDArray[np.float32]

FP8_BLOCK = 128
"""Rows and columns of a block that shares one scale (`weight_block_size` of DeepSeek-V3 and Qwen3 FP8 releases)."""

FP8_MAX = 448.0
"""Largest finite E4M3 value (OCP 8-bit floating point specification 1.0)."""

MX_BLOCK = 32
"""Values that share one scale in MXFP4 (OCP Microscaling formats specification 1.0)."""


@lru_cache(maxsize=1)
def _e4m3() -> Floats:
    """The 256 values of E4M3 (no infinities; 0x7F and 0xFF are NaN)."""
    import ml_dtypes
    import numpy as np

    values: Floats = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return values


def to_bf16(values: Floats) -> Words:
    """FP32 values as BF16 bits, rounded to nearest, ties to even."""
    import ml_dtypes
    import numpy as np

    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def decode_fp8(codes: Bytes, scales: Floats, first_row: int) -> Words:
    """BF16 bits of rows of an FP8 tensor with block scales.

    Args:
        codes: E4M3 bytes [rows, columns].
        scales: `weight_scale_inv` [row blocks, column blocks], FP32, of the blocks that the rows touch; a value is
            code times scale. One scale of shape [1, 1] serves a whole tensor when `columns` and rows are one block.
        first_row: index of the first row in the whole tensor; blocks are counted from the tensor's first row.

    Returns:
        [rows, columns] as `uint16`.
    """
    import numpy as np

    rows, columns = codes.shape
    out = np.empty((rows, columns), np.uint16)
    top = 0
    for block_row in range(scales.shape[0]):
        bottom = min(rows, (first_row // FP8_BLOCK + block_row + 1) * FP8_BLOCK - first_row)
        for block in range(scales.shape[1]):
            left, right = block * FP8_BLOCK, min(columns, (block + 1) * FP8_BLOCK)
            table = to_bf16(_e4m3() * scales[block_row, block])
            out[top:bottom, left:right] = table[codes[top:bottom, left:right]]
        top = bottom
    return out


def encode_fp8(values: Floats) -> tuple[Bytes, Floats]:
    """E4M3 bytes and block scales of a tensor, or of a stripe of it that starts at a block's first row.

    The scale of a block is its largest magnitude divided by 448, so that the largest value becomes 448; a block of
    zeros has the scale 1. Infinities saturate at the block's largest finite value's scale; NaN stays NaN.

    Args:
        values: [rows, columns], FP32.

    Returns:
        codes [rows, columns] and scales [ceil(rows / 128), ceil(columns / 128)].
    """
    import ml_dtypes
    import numpy as np

    rows, columns = values.shape
    height, width = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padded = np.zeros((height * FP8_BLOCK, width * FP8_BLOCK), np.float32)
    padded[:rows, :columns] = values
    blocks = padded.reshape(height, FP8_BLOCK, width, FP8_BLOCK)
    largest = np.abs(np.where(np.isfinite(blocks), blocks, np.float32(0))).max(axis=(1, 3))
    scales = np.where(largest > 0, largest / np.float32(FP8_MAX), np.float32(1)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        scaled = np.clip(blocks / scales[:, None, :, None], -FP8_MAX, FP8_MAX)
    codes = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.ascontiguousarray(codes.reshape(padded.shape)[:rows, :columns]), scales


MX_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the E2M1 codes 0 to 7; bit 3 is the sign."""


@lru_cache(maxsize=1)
def _mxfp4_table() -> NDArray[np.uint32]:
    """For scale `s` and byte `b`, entry `s << 8 | b`: BF16 bits of the low nibble's value, then of the high one's."""
    import numpy as np

    magnitudes = np.array(MX_VALUES, np.float64)
    nibbles = np.concatenate([magnitudes, -magnitudes])
    scales = np.exp2(np.arange(256, dtype=np.float64) - 127)
    scales[255] = np.nan
    values = np.multiply.outer(scales, nibbles)
    # Beyond BF16's range the value is infinite, as rounding to nearest says.
    with np.errstate(over="ignore"):
        bits = to_bf16(values.astype(np.float32)).astype(np.uint32)
    byte = np.arange(256)
    return np.ascontiguousarray(bits[:, byte & 15] | bits[:, byte >> 4] << 16).reshape(-1)


def decode_mxfp4(blocks: Bytes, scales: Bytes) -> Words:
    """BF16 bits of MXFP4 blocks.

    Args:
        blocks: packed E2M1 pairs [n, 16], low nibble first.
        scales: biased exponents [n]; a value is E2M1 times 2**(scale - 127).

    Returns:
        [n, 32] as `uint16`.
    """
    import numpy as np

    index = blocks.astype(np.uint16)
    index |= (scales.astype(np.uint16) << 8)[:, None]
    return _mxfp4_table()[index].view(np.uint16).reshape(len(blocks), MX_BLOCK)


def encode_mxfp4(values: Floats) -> tuple[Bytes, Bytes]:
    """MXFP4 blocks and scales of values, rounded to nearest, ties to even codes.

    The scale is 2**(floor(log2(largest magnitude)) - 2) (OCP Microscaling 1.0, section 6.3), raised by one step where
    the largest value would round beyond 6; magnitudes beyond 6 after that saturate. A block of zeros has scale 2**-127,
    and a block with a NaN or an infinity, which E2M1 does not have, the scale that means NaN (255).

    Args:
        values: [n, 32], FP32.

    Returns:
        blocks [n, 16] and scales [n].
    """
    import numpy as np

    finite = np.asarray(np.isfinite(values).all(axis=1))
    values = np.where(finite[:, None], values, np.float32(0))
    largest = np.abs(values).max(axis=1)
    _, exponent = np.frexp(largest)
    power = np.where(largest > 0, exponent - 3, -127)
    scaled_largest = np.ldexp(largest, -power)
    power = np.clip(power + (scaled_largest > 7), -127, 127).astype(np.int32)
    scaled = np.abs(np.ldexp(values, -power[:, None]))
    # Halfway points between neighbouring codes; a tie goes to the even code: up from an odd one, down to an even one.
    edges = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    codes = np.zeros(values.shape, np.uint8)
    for number, edge in enumerate(edges):
        codes += scaled > edge if number % 2 == 0 else scaled >= edge
    codes |= np.signbit(values).astype(np.uint8) << 3
    packed: Bytes = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    return packed, np.where(finite, power + 127, 255).astype(np.uint8)
