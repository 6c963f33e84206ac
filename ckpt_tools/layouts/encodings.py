"""Quantised forms of a leaf: which tensors store it, which bytes of them a range of it needs, and its values.

An encoding is a pure description. Ranges are counted in items of the leaf, row-major in the whole tensor, so that the
blocks are those of the whole tensor whatever the shard (the first row of a shard may lie inside a block).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

from ckpt_tools.core.dtypes import DTYPES, DType
from ckpt_tools.core.errors import LayoutError
from ckpt_tools.layouts import codecs

VALUES = DTYPES["BF16"]
"""Dtype of a decoded leaf, the one that published models compute in."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor of an encoded leaf."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def items(self) -> int:
        return prod(self.shape)


class Encoding(Protocol):
    """A quantised form. Stateless; `shape` is always that of the whole leaf."""

    name: str

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

    def decode(self, shape: tuple[int, ...], low: int, stored: tuple[memoryview, ...]) -> memoryview:
        """BF16 bytes of a range from the bytes of its parts' ranges."""

    def encode(self, shape: tuple[int, ...], values: memoryview) -> tuple[memoryview, ...]:
        """The bytes of the parts' ranges from the FP32 bytes of a range."""


class Fp8Blocks:
    """E4M3 with one FP32 scale for each 128x128 block: `weight` and `weight_scale_inv` (DeepSeek-V3, Qwen3 FP8)."""

    name = "fp8"

    def part_names(self, leaf: str) -> tuple[str, ...]:
        return leaf, f"{leaf}_scale_inv"

    def parts(self, leaf: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        if len(shape) != 2:
            raise LayoutError(f"{leaf} {list(shape)} has no FP8 form in blocks: it is not a matrix")
        blocks = tuple(-(-n // codecs.FP8_BLOCK) for n in shape)
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

    def decode(self, shape: tuple[int, ...], low: int, stored: tuple[memoryview, ...]) -> memoryview:
        import numpy as np

        columns = shape[1]
        codes = np.frombuffer(stored[0], np.uint8).reshape(-1, columns)
        scales = np.frombuffer(stored[1], np.float32).reshape(-1, -(-columns // codecs.FP8_BLOCK))
        return codecs.decode_fp8(codes, scales, low // columns).data.cast("B")

    def encode(self, shape: tuple[int, ...], values: memoryview) -> tuple[memoryview, ...]:
        import numpy as np

        codes, scales = codecs.encode_fp8(np.frombuffer(values, np.float32).reshape(-1, shape[1]))
        return codes.data.cast("B"), scales.data.cast("B")


class Mxfp4:
    """E2M1 pairs with one power-of-two scale for each 32 values: `*_blocks` and `*_scales` (GPT-OSS)."""

    name = "mxfp4"

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

    def decode(self, shape: tuple[int, ...], low: int, stored: tuple[memoryview, ...]) -> memoryview:  # noqa: ARG002
        import numpy as np

        blocks = np.frombuffer(stored[0], np.uint8).reshape(-1, codecs.MX_BLOCK // 2)
        return codecs.decode_mxfp4(blocks, np.frombuffer(stored[1], np.uint8)).data.cast("B")

    def encode(self, shape: tuple[int, ...], values: memoryview) -> tuple[memoryview, ...]:  # noqa: ARG002
        import numpy as np

        blocks, scales = codecs.encode_mxfp4(np.frombuffer(values, np.float32).reshape(-1, codecs.MX_BLOCK))
        return blocks.data.cast("B"), scales.data.cast("B")


ENCODINGS: Mapping[str, Encoding] = {"fp8": Fp8Blocks(), "mxfp4": Mxfp4()}
