"""Value-changing steps at a leaf. Never implicit: a copy casts only where the plan's dtypes differ."""

from __future__ import annotations

from ckpt_tools.core.dtypes import DType


def cast(data: memoryview, source: DType, target: DType) -> memoryview:
    """The items of `data` in another floating-point type, rounded to nearest, ties to even.

    NaN stays NaN and infinities stay infinite; values beyond the range of the target become infinite.
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        converted = np.frombuffer(data, _numpy(source)).astype(_numpy(target))
    return converted.view(np.uint8).data


def _numpy(dtype: DType):  # type: ignore[no-untyped-def]
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16) if dtype.name == "BF16" else np.dtype(f"f{dtype.itemsize}")
