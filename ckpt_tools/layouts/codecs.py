"""Value-changing forms of a leaf: FP8 with one scale a block, a row or a tensor, and MXFP4.

A codec turns the stored tensors of a quantised leaf into its values and back, given where they lie in the whole tensor:
results do not depend on how a tensor is sharded or cut. Everything is integer and FP32 arithmetic on whole arrays that
fit a core's cache, and numpy lets other threads run meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from ckpt_tools.core.scratch import scratch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

    Bytes = NDArray[np.uint8]
    Words = NDArray[np.uint16]
    Floats = NDArray[np.float32]
    Values = Words | Floats

FP8_BLOCK = 128
"""Rows and columns of a block that shares one scale (`weight_block_size` of DeepSeek-V3 and Qwen3 FP8 releases)."""

FP8_MAX = 448.0
"""Largest finite E4M3 value (OCP 8-bit floating point specification 1.0)."""

MX_BLOCK = 32
"""Values that share one scale in MXFP4 (OCP Microscaling formats specification 1.0)."""

_CHUNK = 1 << 16
"""Values that are worked on at once: their FP32 copies stay in a core's second-level cache."""

SCRATCH = 32 * _CHUNK
"""Upper bound of the bytes that a codec holds in a thread beside its arguments, where rows are not very long."""


def decode_fp8(codes: Bytes, scales: Floats, first_row: int = 0, out: Values | None = None) -> Values:
    """Values of rows of an FP8 tensor: code times scale in FP32, for BF16 rounded once more, ties to even.

    Args:
        codes: E4M3 bytes [rows, columns].
        scales: FP32 [row blocks, column blocks] of the blocks of 128x128 that the rows touch.
        first_row: index of the first row in the whole tensor; blocks are counted from the tensor's first row.
        out: [rows, columns] to fill with FP32, or with BF16 bits (`uint16`, the default).
    """
    import numpy as np

    out = np.empty(codes.shape, np.uint16) if out is None else out
    for block_row, top, bottom in _stripes(codes.shape[0], first_row):
        factors = scales[block_row].repeat(FP8_BLOCK)[: codes.shape[1]]
        for rows in _chunks(top, bottom, codes.shape[1]):
            _multiply(codes[rows], factors, out[rows])
    return out


def decode_fp8_rows(codes: Bytes, scales: Floats, out: Values | None = None) -> Values:
    """Values of rows of an FP8 tensor that have a scale each, or one for all of them, as `decode_fp8` computes them.

    Args:
        codes: E4M3 bytes [rows, columns].
        scales: FP32 [rows] or [1].
        out: [rows, columns] to fill with FP32, or with BF16 bits (`uint16`, the default).
    """
    import numpy as np

    out = np.empty(codes.shape, np.uint16) if out is None else out
    factors = np.broadcast_to(scales, (codes.shape[0],))[:, None]
    for rows in _chunks(0, *codes.shape):
        _multiply(codes[rows], factors[rows], out[rows])
    return out


def _multiply(codes: Bytes, factors: Floats, out: Values) -> None:
    import ml_dtypes
    import numpy as np

    # Sign, exponent and fraction of E4M3, moved to where FP32 has them: the value, subnormal or not, times 2**-120.
    bits = _array("decoded", codes.shape, np.int32)
    np.copyto(bits, codes.view(np.int8))
    bits <<= 20
    bits &= -0x78100000
    nan = (codes & 0x7F) == 0x7F
    if nan.any():
        bits[nan] = np.where(bits[nan] < 0, -0x400000, 0x7FC00000)
    values = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= np.float32(2.0**120)
        if out.dtype == np.float32:
            np.multiply(values, factors, out=out)
            return
        values *= factors
        np.copyto(out.view(ml_dtypes.bfloat16), values, casting="same_kind")


def encode_fp8(
    values: Values, out: tuple[Bytes, Floats] | None = None, *, powers_of_two: bool = False
) -> tuple[Bytes, Floats]:
    """E4M3 codes and block scales of a tensor, or of a stripe of it that starts at a block's first row.

    The scale of a block is its largest magnitude divided by 448, so that the largest value becomes 448; a block of
    zeros has the scale 1. Infinities become 448 at the scale of the block's finite values; NaN stays NaN.

    Args:
        values: [rows, columns], FP32, or BF16 bits.
        out: codes [rows, columns] and FP32 scales [ceil(rows / 128), ceil(columns / 128)] to fill.
        powers_of_two: raise every scale to the next power of two (`scale_fmt: ue8m0` of DeepSeek V3.1).
    """
    import numpy as np

    rows, columns = values.shape
    if out is None:
        out = np.empty((rows, columns), np.uint8), np.empty((-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)), "f4")
    codes, scales = out
    starts = np.arange(0, columns, FP8_BLOCK)
    for block_row, top, bottom in _stripes(rows, 0):
        largest = np.zeros(columns, np.float32)
        for chunk in _chunks(top, bottom, columns):
            np.maximum(largest, _largest(values[chunk], axis=0), out=largest)
        found = _fp8_scales(np.maximum.reduceat(largest, starts))
        if powers_of_two:
            found = ((found.view(np.uint32) + 0x7FFFFF) & 0xFF800000).view(np.float32)
        scales[block_row] = found
        factors = scales[block_row].repeat(FP8_BLOCK)[:columns]
        for chunk in _chunks(top, bottom, columns):
            _divide(values[chunk], factors, codes[chunk])
    return codes, scales


def encode_fp8_rows(values: Values, out: tuple[Bytes, Floats] | None = None) -> tuple[Bytes, Floats]:
    """E4M3 codes and one scale for each row, by the same rule as `encode_fp8`.

    Args:
        values: [rows, columns], FP32, or BF16 bits.
        out: codes [rows, columns] and FP32 scales [rows] to fill.
    """
    import numpy as np

    codes, scales = out or (np.empty(values.shape, np.uint8), np.empty(values.shape[0], np.float32))
    for chunk in _chunks(0, *values.shape):
        scales[chunk] = _fp8_scales(_largest(values[chunk], axis=1))
        _divide(values[chunk], scales[chunk][:, None], codes[chunk])
    return codes, scales


def _largest(values: Values, axis: int) -> Floats:
    """The largest finite magnitudes along an axis, FP32."""
    import numpy as np

    # Magnitudes compare as their bits do.
    is_bf16 = values.dtype == np.uint16
    bits = _array("values", values.shape, values.dtype if is_bf16 else np.uint32)
    np.bitwise_and(values.view(bits.dtype), 0x7FFF if is_bf16 else 0x7FFFFFFF, out=bits)
    infinity = 0x7F80 if is_bf16 else 0x7F800000
    if bits.max(initial=0) >= infinity:
        bits[bits >= infinity] = 0
    largest = bits.max(axis=axis, initial=0).astype(np.uint32)
    if is_bf16:
        largest <<= 16
    return np.asarray(largest.view(np.float32))


def _fp8_scales(largest: Floats) -> Floats:
    import numpy as np

    scales = largest / np.float32(FP8_MAX)
    # A magnitude so small that its scale is no FP32 number is as good as zero.
    return np.where(scales > 0, scales, np.float32(1))


def _divide(values: Values, scales: Floats, out: Bytes) -> None:
    """The E4M3 codes nearest to value / scale in FP32, ties to even; beyond 448 it is 448, NaN stays NaN."""
    import numpy as np

    scaled = _floats(values)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled /= scales
    bits = scaled.view(np.uint32)
    signs = _array("signs", bits.shape, np.uint32)
    np.right_shift(bits, 24, out=signs)
    signs &= 0x80
    bits &= 0x7FFFFFFF
    # Up to 464, halfway to the code after 448, rounding gives 448 by itself.
    if not scaled.max(initial=0) <= 464:
        nan = np.isnan(scaled)
        scaled[nan] = 0
        signs[nan] |= 0x7F
        np.minimum(scaled, np.float32(FP8_MAX), out=scaled)
    # Adding 2**20 times the power of two at or below a value leaves it rounded to 3 bits of fraction, by the adder
    # itself; below 2**-6, where E4M3 is subnormal, that power stays 2**-6 and the rounding is to multiples of 2**-9.
    powers = _array("powers", bits.shape, np.uint32)
    np.bitwise_and(bits, 0x7F800000, out=powers)
    # An array where a number would do: numpy's loop for numbers is three times as slow.
    np.maximum(powers, np.full(powers.shape[1:], (127 - 6) << 23, np.uint32), out=powers)
    powers += 20 << 23
    scaled += powers.view(np.float32)
    # What the addition left above the power is fraction with its leading bit, 0 to 16; the exponent is in front of it.
    bits -= powers
    powers >>= 20
    bits += powers
    bits -= (127 - 6 + 20) << 3
    bits |= signs
    np.copyto(out, bits, casting="same_kind")


def _floats(values: Values) -> Floats:
    """An FP32 copy that may be overwritten."""
    import numpy as np

    if values.dtype == np.float32:
        floats: Floats = _array("values", values.shape, np.float32)
        np.copyto(floats, values)
        return floats
    wide: NDArray[np.uint32] = _array("values", values.shape, np.uint32)
    np.copyto(wide, values)
    wide <<= 16
    return np.asarray(wide.view(np.float32))


def _stripes(rows: int, first_row: int) -> Iterator[tuple[int, int, int]]:
    """(block row, first row, last row + 1), counted from `first_row`, of each row of blocks that `rows` rows touch."""
    top = 0
    for block_row in range(-(-(first_row % FP8_BLOCK + rows) // FP8_BLOCK)):
        bottom = min(rows, (first_row // FP8_BLOCK + block_row + 1) * FP8_BLOCK - first_row)
        yield block_row, top, bottom
        top = bottom


def _chunks(top: int, bottom: int, columns: int) -> Iterator[slice]:
    """Rows `[top, bottom)` in slices of about `_CHUNK` values."""
    step = max(1, _CHUNK // max(1, columns))
    return (slice(row, min(row + step, bottom)) for row in range(top, bottom, step))


def _array(slot: str, shape: tuple[int, ...], dtype: DTypeLike):  # type: ignore[no-untyped-def]
    """An array of this thread, whose content lasts until the slot is asked for again."""
    import numpy as np

    found = np.dtype(dtype)
    return np.frombuffer(scratch(slot, prod(shape) * found.itemsize), found).reshape(shape)


MX_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the E2M1 codes 0 to 7; bit 3 is the sign."""

_MX_EDGES = (0x3E80, 0x3F40, 0x3FA0, 0x3FE0, 0x4020, 0x4060, 0x40A0)
"""BF16 bits of the points halfway between neighbouring magnitudes: 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.

A tie goes to the even code: up from an odd one, down to an even one."""


@lru_cache(maxsize=1)
def _mxfp4_table() -> NDArray[np.uint32]:
    """For scale `s` and byte `b`, entry `s << 8 | b`: BF16 bits of the low nibble's value, then of the high one's."""
    import ml_dtypes
    import numpy as np

    magnitudes = np.array(MX_VALUES, np.float64)
    nibbles = np.concatenate([magnitudes, -magnitudes])
    scales = np.exp2(np.arange(256, dtype=np.float64) - 127)
    scales[255] = np.nan
    values = np.multiply.outer(scales, nibbles)
    # Beyond BF16's range the value is infinite, as rounding to nearest says.
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return np.ascontiguousarray(bits[:, byte & 15] | bits[:, byte >> 4] << 16).reshape(-1)


def decode_mxfp4(blocks: Bytes, scales: Bytes, out: Values | None = None) -> Values:
    """Values of MXFP4 blocks, exact in BF16 but for those beyond its range, which become infinite.

    Args:
        blocks: packed E2M1 pairs [n, 16], low nibble first.
        scales: biased exponents [n]; a value is E2M1 times 2**(scale - 127).
        out: [n, 32] to fill with FP32, or with BF16 bits (`uint16`, the default).
    """
    import numpy as np

    out = np.empty((len(blocks), MX_BLOCK), np.uint16) if out is None else out
    for chunk in _chunks(0, len(blocks), MX_BLOCK):
        is_bf16 = out.dtype == np.uint16
        words = out[chunk] if is_bf16 else _array("words", out[chunk].shape, np.uint16)
        codes = blocks[chunk]
        high = scales[chunk].astype(np.uint16)
        high <<= 8
        index = _array("index", codes.shape, np.uint16)
        np.copyto(index, high[:, None])
        index |= codes
        places = _array("places", codes.shape, np.intp)
        np.copyto(places, index)
        # No index is out of range; clipping is numpy's fastest way to take.
        np.take(_mxfp4_table(), places, out=words.view(np.uint32), mode="clip")
        if not is_bf16:
            out[chunk] = _floats(words)
    return out


def encode_mxfp4(values: Values, out: tuple[Bytes, Bytes] | None = None) -> tuple[Bytes, Bytes]:
    """MXFP4 blocks and scales of values, rounded to nearest, ties to even codes.

    The scale is 2**(floor(log2(largest magnitude)) - 2) (OCP Microscaling 1.0, section 6.3), raised by one step where
    the largest value would round beyond 6; magnitudes beyond 6 after that saturate. A block of zeros has scale 2**-127,
    and a block with a NaN or an infinity, which E2M1 does not have, the scale that means NaN (255).

    Args:
        values: [n, 32], FP32, or BF16 bits.
        out: blocks [n, 16] and scales [n] to fill.
    """
    import numpy as np

    blocks, scales = out or (np.empty((len(values), MX_BLOCK // 2), np.uint8), np.empty(len(values), np.uint8))
    for chunk in _chunks(0, len(values), MX_BLOCK):
        _encode_mxfp4(values[chunk], blocks[chunk], scales[chunk])
    return blocks, scales


def _encode_mxfp4(values: Values, blocks: Bytes, scales: Bytes) -> None:
    import numpy as np

    # Row k holds the words 4k to 4k + 3 of every block: what belongs to a block is then added along contiguous rows,
    # and it takes a fourth of the moves of a full transposition to come here and back.
    count = len(values)
    words = _array("words", (MX_BLOCK // 4, 4 * count), np.uint16)
    np.copyto(words.view(np.uint64), (values if values.dtype == np.uint16 else _sticky_bf16(values)).view(np.uint64).T)
    signs = _array("scaled", words.shape, np.uint16)
    np.right_shift(words, 12, out=signs)
    signs &= 8
    codes = _array("codes", words.shape, np.uint8)
    np.copyto(codes, signs, casting="same_kind")
    words &= 0x7FFF
    largest = words.max(axis=0)
    for _ in range(2):
        largest = np.maximum(largest[0::2], largest[1::2])
    # The exponent field is floor(log2) + 127; 7 is the largest magnitude, at scale 1, that rounds to 6 and not to 8.
    powers = (largest >> 7).astype(np.int16) + ((largest & 0x7F) > 0x60)
    powers = np.minimum(np.maximum(powers, 2) - 2, 254)
    nan = largest >= 0x7F80
    if nan.any():
        words[:, nan.repeat(4)] = 0
        codes[:, nan.repeat(4)] = 0
        powers[nan] = 255
    scaled = _divided(words, powers.repeat(4))
    above = _array("above", words.shape, np.bool_)
    for number, edge in enumerate(_MX_EDGES):
        (np.greater if number % 2 == 0 else np.greater_equal)(scaled, edge, out=above)
        codes += above.view(np.uint8)
    pairs = codes.view(np.uint16)
    pairs |= pairs >> 4
    packed = _array("packed", pairs.shape, np.uint8)
    np.copyto(packed, pairs, casting="same_kind")
    np.copyto(blocks.view(np.uint16), packed.view(np.uint16).T)
    np.copyto(scales, powers, casting="unsafe")


def _divided(words: Words, powers: NDArray[np.int16]) -> NDArray[np.int16]:
    """BF16 bits of magnitudes divided by 2**(power - 127); what is below 0.25 is not exact. Overwrites `words`."""
    import numpy as np

    if powers.min(initial=2) >= 2:
        # Subtracting exponents makes something else of zero, but nothing that reaches 0.25.
        bits = words.view(np.int16)
        bits -= (powers - 127) << 7
        return bits
    values = _floats(words)
    values *= np.exp2(127 - powers.astype(np.float32))
    return (values.view(np.uint32) >> 16).astype(np.int16)


def _sticky_bf16(values: Values) -> Words:
    """The upper half of FP32 bits, its last bit set where the lower half is not zero.

    Numbers of up to 6 bits of fraction compare with the result as they do with the values.
    """
    import numpy as np

    bits = values.view(np.uint32)
    upper: Words = _array("upper", bits.shape, np.uint16)
    wide = _array("values", bits.shape, np.uint32)
    np.right_shift(bits, 16, out=wide)
    np.copyto(upper, wide, casting="same_kind")
    upper |= (bits & 0xFFFF) != 0
    return upper
