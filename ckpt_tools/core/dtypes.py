"""Element types under their safetensors names, with their width and their torch name."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_tools.core.errors import FormatError
from ckpt_tools.core.names import nearest


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: the safetensors name, for example `BF16`.
        bits: width of one element in bits (4, 6 or 8 and up; widths under 8 are packed).
        torch_name: the attribute of the `torch` module, or None where torch has no such type.
        is_float: a floating-point type wide enough to be cast (16 bits or more).
    """

    name: str
    bits: int
    torch_name: str | None
    is_float: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of one element; raises `FormatError` for types narrower than a byte."""
        if self.bits % 8:
            raise FormatError(f"{self.name} elements are {self.bits} bits wide and have no byte address")
        return self.bits // 8

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` packed elements; raises `FormatError` when they do not fill whole bytes."""
        total, rest = divmod(numel * self.bits, 8)
        if rest:
            raise FormatError(f"{numel} elements of {self.name} do not fill whole bytes")
        return total

    def __str__(self) -> str:
        return self.name


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("BOOL", 8, "bool"),
        DType("F4", 4, "float4_e2m1fn_x2"),
        DType("F6_E2M3", 6, None),
        DType("F6_E3M2", 6, None),
        DType("U8", 8, "uint8"),
        DType("I8", 8, "int8"),
        DType("F8_E5M2", 8, "float8_e5m2"),
        DType("F8_E4M3", 8, "float8_e4m3fn"),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        DType("I16", 16, "int16"),
        DType("U16", 16, "uint16"),
        DType("F16", 16, "float16", is_float=True),
        DType("BF16", 16, "bfloat16", is_float=True),
        DType("I32", 32, "int32"),
        DType("U32", 32, "uint32"),
        DType("F32", 32, "float32", is_float=True),
        DType("C64", 64, "complex64"),
        DType("F64", 64, "float64", is_float=True),
        DType("I64", 64, "int64"),
        DType("U64", 64, "uint64"),
    )
}
BY_TORCH_NAME: dict[str, DType] = {d.torch_name: d for d in DTYPES.values() if d.torch_name}


def parse_dtype(text: str) -> DType:
    """The type called `text` in safetensors, torch or short spelling (`BF16`, `bfloat16`, `bf16`, `fp32`).

    Raises:
        FormatError: no such type; the message names the nearest one.
    """
    found = DTYPES.get(text.upper()) or BY_TORCH_NAME.get(text.removeprefix("torch."))
    if found is None and text.lower() in ("fp16", "fp32", "fp64"):
        found = DTYPES["F" + text[2:]]
    if found is None:
        raise FormatError(f"unknown dtype {text!r}", hint=f"did you mean {nearest(text.upper(), DTYPES)}?")
    return found
