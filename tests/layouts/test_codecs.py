"""Codecs against float64 references, at every alignment, and what a round trip keeps."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ckpt_tools.layouts.codecs import MX_VALUES, decode_fp8, decode_mxfp4, encode_fp8, encode_mxfp4

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
