"""Codecs against float64 references, at every alignment, and what a round trip keeps."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_tools.layouts.codecs import (
    MX_VALUES,
    decode_fp8,
    decode_fp8_rows,
    decode_mxfp4,
    encode_fp8,
    encode_fp8_rows,
    encode_mxfp4,
)

E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
RNG = np.random.default_rng(0)


def bf16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", [(576, 256), (128, 128), (1, 130), (300, 5)])
@pytest.mark.parametrize(("first", "last"), [(0, None), (1, None), (72, 144), (130, 131), (127, 257)])
def test_any_rows_of_an_fp8_tensor_decode_with_their_own_blocks_scales(
    shape: tuple[int, int], first: int, last: int | None
) -> None:
    codes = RNG.integers(0, 256, shape, dtype=np.uint8)
    blocks = tuple(-(-n // 128) for n in shape)
    scales = RNG.uniform(1e-4, 2.0, blocks).astype(np.float32)
    expected = bf16(E4M3[codes] * scales.astype(np.float64).repeat(128, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]])
    last = min(shape[0], last or shape[0])
    if first >= last:
        return
    mine = decode_fp8(codes[first:last], scales[first // 128 : (last - 1) // 128 + 1], first)
    assert np.array_equal(mine.view(ml_dtypes.bfloat16), expected[first:last], equal_nan=True)


@pytest.mark.parametrize("shape", [(576, 256), (5, 300), (128, 128)])
def test_fp8_encoding_is_the_nearest_code_at_the_blocks_scale(shape: tuple[int, int]) -> None:
    values = (RNG.standard_normal(shape) * RNG.uniform(1e-3, 10, shape)).astype(np.float32)
    codes, scales = encode_fp8(values)
    scale = scales.astype(np.float64).repeat(128, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]]
    finite = np.unique(E4M3[np.isfinite(E4M3)])
    nearest = np.abs(finite[None] - (values / scale).reshape(-1, 1)).min(axis=1).reshape(shape)
    assert np.all(np.abs(E4M3[codes] - values / scale) <= nearest * (1 + 1e-6) + 1e-6)
    for block in range(scales.shape[0]):
        assert np.abs(E4M3[codes[block * 128 : (block + 1) * 128, :128]]).max() == 448


def test_fp8_codes_survive_decoding_to_bf16_and_encoding_again() -> None:
    codes, _ = encode_fp8(RNG.standard_normal((256, 384)).astype(np.float32))
    scales = RNG.uniform(1e-4, 2.0, (2, 3)).astype(np.float32)
    values = decode_fp8(codes, scales, 0).view(ml_dtypes.bfloat16).astype(np.float32)
    again, new_scales = encode_fp8(values)
    assert np.array_equal(E4M3[again], E4M3[codes])
    assert np.allclose(new_scales, scales, rtol=2**-8)


def test_a_block_of_zeros_encodes_to_zeros() -> None:
    codes, scales = encode_fp8(np.zeros((3, 3), np.float32))
    assert not codes.any()
    assert scales.tolist() == [[1.0]]
    blocks, exponents = encode_mxfp4(np.zeros((1, 32), np.float32))
    assert not blocks.any()
    assert not decode_mxfp4(blocks, exponents).any()


def test_mxfp4_decodes_every_code_and_scale_low_nibble_first() -> None:
    scales = np.arange(256, dtype=np.uint8).repeat(16)
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 1))
    nibbles = np.array([*MX_VALUES, *(-v for v in MX_VALUES)])
    pairs = np.stack([nibbles[blocks & 15], nibbles[blocks >> 4]], axis=-1).reshape(len(blocks), 32)
    factors = np.exp2(scales.astype(np.float64) - 127)
    factors[scales == 255] = np.nan
    with np.errstate(over="ignore"):
        expected = bf16(pairs * factors[:, None])
    found = decode_mxfp4(blocks, scales).view(ml_dtypes.bfloat16)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found.astype(np.float32))[scales < 255], np.signbit(pairs)[scales < 255])


def test_mxfp4_values_survive_decoding_and_encoding_again() -> None:
    blocks = RNG.integers(0, 256, (4000, 16), dtype=np.uint8)
    scales = RNG.integers(100, 140, 4000, dtype=np.uint8)
    values = decode_mxfp4(blocks, scales).view(ml_dtypes.bfloat16).astype(np.float32)
    again = decode_mxfp4(*encode_mxfp4(values)).view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(again, values)
    assert np.array_equal(np.signbit(again), np.signbit(values))


def test_mxfp4_blocks_and_scales_survive_bit_for_bit_where_the_largest_code_is_canonical() -> None:
    blocks = RNG.integers(0, 256, (4000, 16), dtype=np.uint8)
    scales = RNG.integers(100, 140, 4000, dtype=np.uint8)
    canonical = np.maximum(blocks & 7, blocks >> 4 & 7).max(axis=1) >= 6
    assert canonical.mean() > 0.9
    values = decode_mxfp4(blocks, scales).view(ml_dtypes.bfloat16).astype(np.float32)
    again, exponents = encode_mxfp4(values)
    assert np.array_equal(again[canonical], blocks[canonical])
    assert np.array_equal(exponents[canonical], scales[canonical])


def test_mxfp4_encoding_is_the_nearest_value_with_ties_to_even() -> None:
    values = RNG.standard_normal((2000, 32)).astype(np.float32)
    blocks, scales = encode_mxfp4(values)
    decoded = decode_mxfp4(blocks, scales).view(ml_dtypes.bfloat16).astype(np.float64)
    grid = np.array(sorted({*MX_VALUES, *(-v for v in MX_VALUES)}))
    scaled = values / np.exp2(scales.astype(np.float64) - 127)[:, None]
    best = np.abs(grid[None, None] - np.clip(scaled, -6, 6)[..., None]).min(axis=-1)
    assert np.all(np.abs(decoded / np.exp2(scales.astype(np.float64) - 127)[:, None] - np.clip(scaled, -6, 6)) <= best)
    ties = np.zeros((1, 32), np.float32)
    ties[0, :9] = (4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.5)
    tied = decode_mxfp4(*encode_mxfp4(ties)).view(ml_dtypes.bfloat16).astype(np.float32)
    assert tied[0, :9].tolist() == [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -2.0]


def test_nan_and_infinities_never_become_ordinary_values_without_a_trace() -> None:
    values = np.ones((128, 128), np.float32)
    values[0, 0], values[0, 1] = np.nan, np.inf
    codes, scales = encode_fp8(values)
    assert np.isnan(E4M3[codes[0, 0]])
    assert E4M3[codes[0, 1]] == 448
    assert scales[0, 0] == np.float32(1 / 448)
    blocks = np.ones((2, 32), np.float32)
    blocks[1, 3] = np.nan
    decoded = decode_mxfp4(*encode_mxfp4(blocks)).view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(decoded[0], blocks[0])
    assert np.isnan(decoded[1]).all()


SPECIAL = np.array(
    [0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 448.0, -464.0, 464.1, 1e30, 2**-9, -(2**-10), 2**-10 * 1.001, 1e-45],
    np.float32,
)
EDGE_FORMS = st.sampled_from([(1, 1), (3, 5), (160, 130), (576, 40), (129, 257)])


def nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """Codes by comparison in float64 with the points halfway between neighbouring codes, ties to even."""
    magnitudes = E4M3[:127]
    halves = (magnitudes[1:] + magnitudes[:-1]) / 2
    size = np.abs(values)
    low, high = np.searchsorted(halves, size, "left"), np.searchsorted(halves, size, "right")
    codes = np.where(low == high, low, np.where(low % 2 == 0, low, high))
    codes = np.where(np.isnan(values), 0x7F, codes)
    return (codes | np.signbit(values).astype(int) << 7).astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(shape=EDGE_FORMS, seed=st.integers(0, 99), exponent=st.integers(-40, 30), rows=st.booleans())
def test_fp8_codes_are_those_of_a_float64_reference_at_any_magnitude(
    shape: tuple[int, int], seed: int, exponent: int, rows: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(shape) * 2.0 ** rng.integers(exponent - 12, exponent + 1, shape)).astype(np.float32)
    values[rng.random(shape) < 0.1] = 0
    hit = rng.random(shape) < 0.05
    values[hit] = rng.choice(SPECIAL, int(hit.sum()))
    codes, scales = encode_fp8_rows(values) if rows else encode_fp8(values)
    finite = np.where(np.isfinite(values), np.abs(values), 0)
    if rows:
        largest, wide = finite.max(axis=1), scales[:, None]
    else:
        largest = np.array([[block.max() for block in np.split(row, range(128, shape[1], 128), 1)]
                            for row in np.split(finite, range(128, shape[0], 128), 0)])  # fmt: skip
        wide = scales.repeat(128, 0)[: shape[0]].repeat(128, 1)[:, : shape[1]]
    expected = np.where(largest > 0, largest / np.float32(448), 1).astype(np.float32)
    assert np.array_equal(scales, np.where(expected > 0, expected, 1))
    with np.errstate(over="ignore"):
        assert np.array_equal(codes, nearest_e4m3((values / wide).astype(np.float64)))
    again = (decode_fp8_rows if rows else decode_fp8)(codes, scales).view(ml_dtypes.bfloat16).astype(np.float64)
    assert np.array_equal(np.isnan(again), np.isnan(values))
    assert np.array_equal(np.signbit(again), np.signbit(values))


@pytest.mark.parametrize("scale", [1.0, 3e38, 2.0**-126, 1e-42, 0.0, np.inf])
def test_every_e4m3_code_at_extreme_scales_decodes_as_in_float64(scale: float) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    scales = np.full((1, 1), scale, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = (E4M3 * scales.astype(np.float64)).astype(np.float32).reshape(2, 128)
    wide = np.empty((2, 128), np.float32)
    for found in (decode_fp8(codes, scales, out=wide), decode_fp8_rows(codes, scales[0], out=wide.copy())):
        assert np.array_equal(found, exact, equal_nan=True)
        assert np.array_equal(np.signbit(found)[~np.isnan(exact)], np.signbit(exact)[~np.isnan(exact)])
    assert np.array_equal(decode_fp8(codes, scales).view(ml_dtypes.bfloat16), bf16(exact), equal_nan=True)


def test_scales_raised_to_powers_of_two_are_the_next_ones() -> None:
    values = RNG.standard_normal((128, 256)).astype(np.float32)
    plain, powers = encode_fp8(values)[1], encode_fp8(values, powers_of_two=True)[1]
    assert np.array_equal(powers, np.exp2(np.ceil(np.log2(plain.astype(np.float64)))).astype(np.float32))


def mxfp4_reference(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed blocks and scales of finite float64 values [n, 32] by the rule in words, one block after the other."""
    halves = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    blocks, scales = [], []
    for block in values:
        largest = np.abs(block).max()
        power = -127 if largest == 0 else int(np.floor(np.log2(largest))) - 2
        power = max(-127, min(127, power + (largest / 2.0**power > 7)))
        scaled = np.abs(block) / 2.0**power
        low, high = np.searchsorted(halves, scaled, "left"), np.searchsorted(halves, scaled, "right")
        codes = np.where(low % 2 == 0, low, high) | np.signbit(block) << 3
        blocks.append(codes[0::2] | codes[1::2] << 4)
        scales.append(power + 127)
    return np.array(blocks, np.uint8), np.array(scales, np.uint8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), exponent=st.integers(-140, 127), wide=st.booleans())
def test_mxfp4_codes_are_those_of_a_float64_reference_at_any_magnitude(seed: int, exponent: int, wide: bool) -> None:
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        values = np.ldexp(rng.uniform(-2, 2, (40, 32)), rng.integers(exponent - 6, exponent + 1, (40, 32)))
        # Quarters fall on ties; a hair beside one must not.
        values[::2] = np.ldexp(rng.integers(-28, 29, (20, 32)) / 4, exponent)
        values[::4, ::3] *= 1 + 2.0**-20
        values = values.astype(np.float32)
    values[5] = 0
    values[6, 3] = -0.0
    values = values[np.isfinite(values).all(axis=1)]
    stored = values if wide else bf16(np.clip(values, -3e38, 3e38)).view(np.uint16)
    exact = values if wide else stored.view(ml_dtypes.bfloat16)
    blocks, scales = encode_mxfp4(stored)
    expected = mxfp4_reference(exact.astype(np.float64))
    assert np.array_equal(scales, expected[1])
    assert np.array_equal(blocks, expected[0])


def test_arrays_longer_than_a_chunk_are_encoded_as_their_parts_are() -> None:
    values = RNG.standard_normal((384, 700)).astype(np.float32)
    codes, scales = encode_fp8(values)
    for stripe in range(3):
        part, part_scales = encode_fp8(values[stripe * 128 : (stripe + 1) * 128])
        assert np.array_equal(part, codes[stripe * 128 : (stripe + 1) * 128])
        assert np.array_equal(part_scales, scales[stripe : stripe + 1])
    flat = values.reshape(-1, 32)
    assert all(
        np.array_equal(a[5000:5100], b) for a, b in zip(encode_mxfp4(flat), encode_mxfp4(flat[5000:5100]), strict=True)
    )
