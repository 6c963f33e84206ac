"""Quantised forms of a leaf: which tensors store it, which bytes of them a range of it needs, and its values.

An encoding is a pure description. Ranges are counted in items of the leaf, row-major in the whole tensor, so that the
blocks are those of the whole tensor whatever the shard (the first row of a shard may lie inside a block).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

from ckpt_tools.core.dtypes import DTYPES, DType
from ckpt_tools.core.errors import LayoutError
from ckpt_tools.layouts import codecs

if TYPE_CHECKING:
    from ckpt_tools.layouts.codecs import Bytes, Floats, Values

VALUES = DTYPES["BF16"]
"""Dtype of a decoded leaf where none is asked for: the one that published models compute in."""

Buffers = tuple[memoryview, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor of an encoded leaf.

    Repositories spell the shape of a scale with and without dimensions of one, and a floating-point scale in other
    floating-point types; both are read, these are written.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def items(self) -> int:
        return prod(self.shape)


class Encoding(Protocol):
    """A quantised form. Stateless; `shape` is always that of the whole leaf."""

    name: str
    beside: tuple[str, ...]
    """Tensors of the leaf's module, or of the one around it, that hold no weights: scales of activations."""

    def part_names(self, leaf: str) -> tuple[str, ...]:
        """Names of the stored tensors, in the order of `parts`."""

    def parts(self, leaf: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The stored tensors, in a fixed order; raises `LayoutError` when the shape has no such form."""

    def decode_step(self, shape: tuple[int, ...]) -> int:
        """Items that are decoded together: ranges begin and end at multiples."""

    def encode_step(self, shape: tuple[int, ...]) -> int:
        """Items that are encoded together: ranges begin and end at multiples, or at the tensor's end."""

    def ranges(self, shape: tuple[int, ...], low: int, high: int) -> tuple[tuple[int, int], ...]:
        """For each part the (first, last + 1) of its items that items `[low, high)` of the leaf depend on."""

    def decode(self, shape: tuple[int, ...], low: int, stored: Buffers, dtype: DType, out: memoryview) -> None:
        """Fills `out` with the values of a range, as BF16 or F32, from the bytes of its parts' ranges."""

    def encode(self, shape: tuple[int, ...], values: memoryview, dtype: DType, out: Buffers) -> None:
        """Fills the bytes of the parts' ranges from the values of a range, BF16 or F32."""


_SCALES = ("input_scale", "output_scale", "k_scale", "q_scale", "v_scale")


class Fp8Blocks:
    """E4M3 with one FP32 scale for each 128x128 block: `weight` and `weight_scale_inv` (DeepSeek-V3, Qwen3 FP8).

    Args:
        powers_of_two: write scales that are powers of two, as DeepSeek V3.1 has them.
    """

    beside: tuple[str, ...] = _SCALES

    def __init__(self, *, powers_of_two: bool = False) -> None:
        self.name = "fp8-ue8m0" if powers_of_two else "fp8"
        self._powers_of_two = powers_of_two

    def part_names(self, leaf: str) -> tuple[str, ...]:
        return leaf, f"{leaf}_scale_inv"

    def parts(self, leaf: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        blocks = tuple(-(-n // codecs.FP8_BLOCK) for n in _matrix(leaf, shape))
        codes, scales = self.part_names(leaf)
        return Part(codes, DTYPES["F8_E4M3"], shape), Part(scales, DTYPES["F32"], blocks)

    def decode_step(self, shape: tuple[int, ...]) -> int:
        return shape[1]

    def encode_step(self, shape: tuple[int, ...]) -> int:
        return shape[1] * codecs.FP8_BLOCK

    def ranges(self, shape: tuple[int, ...], low: int, high: int) -> tuple[tuple[int, int], ...]:
        columns, across = shape[1], -(-shape[1] // codecs.FP8_BLOCK)
        first, last = low // columns // codecs.FP8_BLOCK, -(-(high // columns) // codecs.FP8_BLOCK)
        return (low, high), (first * across, last * across)

    def decode(self, shape: tuple[int, ...], low: int, stored: Buffers, dtype: DType, out: memoryview) -> None:
        columns = shape[1]
        codecs.decode_fp8(*self._views(shape, stored), low // columns, out=_values(out, dtype, columns))

    def encode(self, shape: tuple[int, ...], values: memoryview, dtype: DType, out: Buffers) -> None:
        scaled = _values(values, dtype, shape[1])
        codecs.encode_fp8(scaled, out=self._views(shape, out), powers_of_two=self._powers_of_two)

    def _views(self, shape: tuple[int, ...], stored: Buffers) -> tuple[Bytes, Floats]:
        return _bytes(stored[0], shape[1]), _floats(stored[1]).reshape(-1, -(-shape[1] // codecs.FP8_BLOCK))


class Fp8Rows:
    """E4M3 with one scale for each row: `weight` and `weight_scale` `[out, 1]` (compressed-tensors, `channel`)."""

    name = "fp8-channel"
    beside: tuple[str, ...] = _SCALES

    def part_names(self, leaf: str) -> tuple[str, ...]:
        return leaf, f"{leaf}_scale"

    def parts(self, leaf: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        codes, scales = self.part_names(leaf)
        return Part(codes, DTYPES["F8_E4M3"], shape), Part(scales, DTYPES["F32"], (_matrix(leaf, shape)[0], 1))

    def decode_step(self, shape: tuple[int, ...]) -> int:
        return shape[1]

    def encode_step(self, shape: tuple[int, ...]) -> int:
        return shape[1]

    def ranges(self, shape: tuple[int, ...], low: int, high: int) -> tuple[tuple[int, int], ...]:
        return (low, high), (low // shape[1], high // shape[1])

    def decode(self, shape: tuple[int, ...], low: int, stored: Buffers, dtype: DType, out: memoryview) -> None:  # noqa: ARG002
        columns = shape[1]
        codecs.decode_fp8_rows(_bytes(stored[0], columns), _floats(stored[1]), out=_values(out, dtype, columns))

    def encode(self, shape: tuple[int, ...], values: memoryview, dtype: DType, out: Buffers) -> None:
        columns = shape[1]
        codecs.encode_fp8_rows(_values(values, dtype, columns), out=(_bytes(out[0], columns), _floats(out[1])))


class Fp8Tensor(Fp8Rows):
    """E4M3 with one scale for the tensor: `weight` and `weight_scale` (modelopt, compressed-tensors, AutoFP8).

    It is read only: its scale depends on the whole tensor, and one for each row is published in the same format.
    """

    name = "fp8-tensor"

    def parts(self, leaf: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        codes, scale = self.part_names(leaf)
        return Part(codes, DTYPES["F8_E4M3"], _matrix(leaf, shape)), Part(scale, DTYPES["F32"], ())

    def ranges(self, shape: tuple[int, ...], low: int, high: int) -> tuple[tuple[int, int], ...]:  # noqa: ARG002
        return (low, high), (0, 1)

    def encode(self, *_: object) -> None:
        raise LayoutError(f"the form {self.name} is read, not written", hint="write fp8 or fp8-channel instead")


class Mxfp4:
    """E2M1 pairs with one power-of-two scale for each 32 values: `*_blocks` and `*_scales` (GPT-OSS)."""

    name = "mxfp4"
    beside: tuple[str, ...] = ()

    def part_names(self, leaf: str) -> tuple[str, ...]:
        return f"{leaf}_blocks", f"{leaf}_scales"

    def parts(self, leaf: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        if not shape or shape[-1] % codecs.MX_BLOCK:
            raise LayoutError(f"{leaf} {list(shape)} has no MXFP4 form: its rows are not blocks of {codecs.MX_BLOCK}")
        blocks = (*shape[:-1], shape[-1] // codecs.MX_BLOCK)
        pairs, scales = self.part_names(leaf)
        return Part(pairs, DTYPES["U8"], (*blocks, codecs.MX_BLOCK // 2)), Part(scales, DTYPES["U8"], blocks)

    def decode_step(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        return codecs.MX_BLOCK

    def encode_step(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        return codecs.MX_BLOCK

    def ranges(self, shape: tuple[int, ...], low: int, high: int) -> tuple[tuple[int, int], ...]:  # noqa: ARG002
        return (low // 2, high // 2), (low // codecs.MX_BLOCK, high // codecs.MX_BLOCK)

    def decode(self, shape: tuple[int, ...], low: int, stored: Buffers, dtype: DType, out: memoryview) -> None:  # noqa: ARG002
        codecs.decode_mxfp4(*self._views(stored), out=_values(out, dtype, codecs.MX_BLOCK))

    def encode(self, shape: tuple[int, ...], values: memoryview, dtype: DType, out: Buffers) -> None:  # noqa: ARG002
        codecs.encode_mxfp4(_values(values, dtype, codecs.MX_BLOCK), out=self._views(out))

    def _views(self, stored: Buffers) -> tuple[Bytes, Bytes]:
        return _bytes(stored[0], codecs.MX_BLOCK // 2), _bytes(stored[1], 1).reshape(-1)


def _matrix(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 2:
        raise LayoutError(f"{leaf} {list(shape)} has no FP8 form: it is not a matrix")
    return shape


def _values(data: memoryview, dtype: DType, columns: int) -> Values:
    import numpy as np

    found: Values = np.frombuffer(data, np.uint16 if dtype is VALUES else np.float32).reshape(-1, columns)  # type: ignore[assignment]
    return found


def _bytes(data: memoryview, columns: int) -> Bytes:
    import numpy as np

    return np.frombuffer(data, np.uint8).reshape(-1, columns)


def _floats(data: memoryview) -> Floats:
    import numpy as np

    return np.frombuffer(data, np.float32)


_ALL: tuple[Encoding, ...] = (Fp8Blocks(), Fp8Blocks(powers_of_two=True), Fp8Rows(), Fp8Tensor(), Mxfp4())
ENCODINGS: Mapping[str, Encoding] = {encoding.name: encoding for encoding in _ALL}
