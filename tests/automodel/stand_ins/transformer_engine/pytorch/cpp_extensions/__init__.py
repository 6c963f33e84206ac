"""Products and norms."""

# ruff: noqa: ARG001, F401, PT018

import torch

from ..constants import TE_DType
from ..quantizers import Quantized
from .fused_attn import FusedAttnBackend, fused_attn_bwd, fused_attn_fwd

_TORCH_DTYPES = {value: key for key, value in TE_DType.items()}


def general_gemm(
    A,
    B,
    out_dtype=None,
    quantization_params=None,
    gelu=False,
    gelu_in=None,
    alpha=1.0,
    beta=None,
    accumulate=False,
    layout="TN",
    out=None,
    bias=None,
    use_split_accumulator=False,
    grad=False,
    ub=None,
    ub_type=None,
    extra_output=None,
    bulk_overlap=False,
):
    assert layout in ("TN", "NN", "NT"), f"GEMM layout {layout} not supported."
    left = _side(A, "rowwise" if layout[0] == "T" else "columnwise")
    right = _side(B, "columnwise" if layout[1] == "T" else "rowwise")
    # cuBLAS sees columns where torch sees rows: the product is of B and A.
    product = (right.mT if layout[1] == "T" else right) @ (left.mT if layout[0] == "T" else left)
    if bias is not None:
        product = product + bias.double()
    result = product.to(out_dtype or A.dtype)
    if out is not None:
        if not out.is_contiguous():
            raise ValueError("Output tensor is not contiguous.")
        result = out.copy_(result)
    return result, None, None, None


def general_grouped_gemm(
    A,
    B,
    out,
    quantization_params,
    out_dtype,
    layout="TN",
    m_splits=None,
    gelu=False,
    grad=False,
    accumulate=False,
    bias=None,
    use_bias=False,
    use_split_accumulator=False,
    D_dtype=None,
    single_output=False,
):
    assert len(A) == len(B) == len(quantization_params), "one of each for every product"
    parts = out[0].split(m_splits) if single_output else out
    for index, (left, right, part) in enumerate(zip(A, B, parts, strict=True)):
        general_gemm(left, right, layout=layout, out=part, bias=bias[index] if use_bias else None)
    return out, None, None


def rmsnorm_fwd(input, weight, eps, ln_out, quantizer, odtype, sm_margin, zero_centered_gamma):
    _require_rows(input, weight)
    scales = torch.rsqrt(input.double().square().mean(-1) + eps)
    gamma = weight.double() + zero_centered_gamma
    return (input.double() * scales.unsqueeze(-1) * gamma).to(_TORCH_DTYPES[odtype]), None, scales.float()


def rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
    _require_rows(x, gamma)
    normal = x.double() * rsigma.double().unsqueeze(-1)
    weighted = dz.double() * (gamma.double() + zero_centered_gamma)
    along = (weighted * normal).mean(-1, keepdim=True)
    grad_x = (weighted - normal * along) * rsigma.double().unsqueeze(-1)
    return [grad_x.to(x.dtype), (dz.double() * normal).sum(0).to(gamma.dtype)]


def _side(matrix, usage):
    if isinstance(matrix, Quantized):
        values = getattr(matrix, usage)
        if values is None:
            raise RuntimeError(f"GEMM requested the {usage} representation, but it is unavailable.")
        return values
    assert matrix.is_contiguous() and matrix.dtype in (torch.bfloat16, torch.float16), "a contiguous matrix"
    return matrix.double()


def _require_rows(rows, weight):
    assert rows.ndim == 2 and rows.dtype == weight.dtype, "rows [M, N] of the weight's dtype"
