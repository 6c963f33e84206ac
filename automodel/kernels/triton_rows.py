"""Triton kernels over the rows of expert layers: activation, sums over a token's rows, sums over an expert's rows.

Imported only where Triton is installed. Every kernel is one pass over its inputs in their own dtype, computes in FP32,
and takes its sizes from the host and its row counts from the device, so that nothing waits.

Legend: M rows sorted by expert, N tokens, K experts a token, C columns, F expert width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from automodel.kernels.activations import ClampedSwiGLU, GatedActivation, Ungated, is_relu_squared, is_swiglu

_SWIGLU, _CLAMPED, _RELU_SQUARED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_LIMITED_PROGRAMS = 4096
"""Programs over rows of which the device knows how many there are: two waves on the largest GPUs."""
_SHARES = 16
"""Programs that share the rows of an expert in a column's sum."""


@dataclass(frozen=True, slots=True)
class ActivationForm:
    """An activation as the kernels take it: its number, the two numbers of GPT-OSS's, how many parts it takes (gate and
    up, or up alone), and whether values of gate and up come in turn instead of all gates first."""

    kind: int
    alpha: float = 0.0
    limit: float = 0.0
    parts: int = 2
    in_turn: bool = False

    @property
    def quack(self) -> str | None:
        """What QuACK calls the activation, None where it has none."""
        return {0: "swiglu", 2: "relu_sq"}.get(self.kind)


def activation_form(activation: GatedActivation | Ungated) -> ActivationForm | None:
    """The form of an activation, None where the kernels have none."""
    if is_swiglu(activation):
        return ActivationForm(0)
    if isinstance(activation, ClampedSwiGLU):
        return ActivationForm(1, activation.alpha, activation.limit)
    if is_relu_squared(activation):
        return ActivationForm(2, parts=1)
    return None


@triton.jit
def _value_and_slopes(gate, up, alpha, limit, KIND: tl.constexpr):
    """The activation, and its derivatives by `gate` and by `up`."""
    if KIND == _SWIGLU:
        share = tl.sigmoid(gate)
        silu = gate * share
        return silu * up, up * (share + silu * (1 - share)), silu
    if KIND == _RELU_SQUARED:
        positive = tl.maximum(gate, 0.0)
        return positive * positive, 2 * positive, up
    clamped_gate = tl.minimum(gate, limit)
    clamped_up = tl.minimum(tl.maximum(up, -limit), limit) + 1
    share = tl.sigmoid(alpha * clamped_gate)
    glu = clamped_gate * share
    by_gate = tl.where(gate <= limit, clamped_up * share * (1 + alpha * clamped_gate * (1 - share)), 0.0)
    by_up = tl.where(tl.abs(up) <= limit, glu, 0.0)
    return clamped_up * glu, by_gate, by_up


@triton.jit
def _gate_and_up(
    h, bias, expert, row, column, inside,
    F: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, IN_TURN: tl.constexpr,
):  # fmt: skip
    """The two parts of a row, or twice the one that it has. Those in turn come as words of both, without a bias."""
    if IN_TURN:
        word = tl.load(h + row * F + column, mask=inside, other=0)
        if h.dtype.element_ty == tl.int32:
            gate, up = word << 16, word & -65536
        else:
            gate, up = word.to(tl.int32), (word >> 32).to(tl.int32)
        return gate.to(tl.float32, bitcast=True), up.to(tl.float32, bitcast=True)
    own = h + row * PARTS * F + column
    gate = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(own + (PARTS - 1) * F, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        own_bias = bias + tl.load(expert + row).to(tl.int64) * PARTS * F + column
        gate += tl.load(own_bias, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(own_bias + (PARTS - 1) * F, mask=inside, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _activate_row(
    row, h, bias, expert, weight, out, alpha, limit,
    F: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < F
    gate, up = _gate_and_up(h, bias, expert, row, column, inside, F, PARTS, HAS_BIAS, False)
    value, _, _ = _value_and_slopes(gate, up, alpha, limit, KIND)
    tl.store(out + row * F + column, (value * tl.load(weight + row)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _activate(
    h, bias, expert, weight, out, used, alpha, limit,
    F: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    LIMITED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if LIMITED:
        end = tl.load(used).to(tl.int64)
        while row < end:
            _activate_row(row, h, bias, expert, weight, out, alpha, limit, F, PARTS, BLOCK, KIND, HAS_BIAS)
            row += tl.num_programs(0)
    else:
        _activate_row(row, h, bias, expert, weight, out, alpha, limit, F, PARTS, BLOCK, KIND, HAS_BIAS)


@triton.jit
def _activate_backward_row(
    row, h, bias, expert, weight, grad, grad_h, out, grad_weight, alpha, limit, scale,
    F: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    IN_TURN: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < F
    gate, up = _gate_and_up(h, bias, expert, row, column, inside, F, PARTS, HAS_BIAS, IN_TURN)
    value, by_gate, by_up = _value_and_slopes(gate, up, alpha, limit, KIND)
    grad_value = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.load(weight + row)
    tl.store(grad_weight + row, tl.sum(grad_value * value))
    tl.store(out + row * F + column, (value * share * scale).to(out.dtype.element_ty), mask=inside)
    grad_value *= share
    to = grad_h + row * PARTS * F + column
    tl.store(to, (grad_value * by_gate).to(grad_h.dtype.element_ty), mask=inside)
    if PARTS == 2:
        tl.store(to + F, (grad_value * by_up).to(grad_h.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward(
    h, bias, expert, weight, grad, grad_h, out, grad_weight, used, alpha, limit, scale,
    F: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr, HAS_BIAS: tl.constexpr,
    IN_TURN: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if LIMITED:
        end = tl.load(used).to(tl.int64)
        while row < end:
            _activate_backward_row(
                row, h, bias, expert, weight, grad, grad_h, out, grad_weight, alpha, limit, scale,
                F, PARTS, BLOCK, KIND, HAS_BIAS, IN_TURN,
            )  # fmt: skip
            row += tl.num_programs(0)
    else:
        _activate_backward_row(
            row, h, bias, expert, weight, grad, grad_h, out, grad_weight, alpha, limit, scale,
            F, PARTS, BLOCK, KIND, HAS_BIAS, IN_TURN,
        )  # fmt: skip


@triton.jit
def _gather_rows(rows, index, out, count, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # Several rows at once: the loads of one row wait for its index alone.
    to = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index + to, mask=to < count, other=0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (to < count)[:, None] & (column < C)[None, :]
    value = tl.load(rows + row[:, None] * C + column[None, :], mask=inside)
    tl.store(out + to[:, None] * C + column[None, :], value, mask=inside)


@triton.jit
def _spread_rows(x, index, out, C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < C
    value = tl.load(x + token * C + column, mask=inside)
    for k in tl.static_range(K):
        row = tl.load(index + token * K + k).to(tl.int64)
        tl.store(out + row * C + column, value, mask=inside)


@triton.jit
def _sum_rows(
    rows, index, factor, weight, bias, expert, out, count,
    C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(index + token * K + k).to(tl.int64)
        present = row < count
        inside = (column < C) & present
        value = tl.load(rows + row * C + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            value *= tl.load(factor + row, mask=present, other=0.0)
        total += value
        if HAS_BIAS:
            own = bias + tl.load(expert + row, mask=present, other=0).to(tl.int64) * C
            value = tl.load(own + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(weight + row, mask=present, other=0.0) * value
    tl.store(out + token * C + column, total.to(out.dtype.element_ty), mask=column < C)


@triton.jit
def _dot_with_bias(rows, bias, expert, out, used, C: tl.constexpr, BLOCK: tl.constexpr, LIMITED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < C
    if LIMITED:
        inside &= row < tl.load(used)
    own = bias + tl.load(expert + row).to(tl.int64) * C
    product = tl.load(rows + row * C + column, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(own + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, tl.load(out + row) + tl.sum(product))


@triton.jit
def _sum_by_expert(
    rows, weight, ends, out, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    # A share of the rows of an expert, so that one which has most of them keeps all multiprocessors busy.
    expert, share = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < C
    end = tl.load(ends + expert).to(tl.int64)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    first = start + share * ROWS
    while first < end:
        row = first + tl.arange(0, ROWS)
        valid = row < end
        value = tl.load(rows + row[:, None] * C + column[None, :], mask=valid[:, None] & inside[None, :], other=0.0).to(
            tl.float32
        )
        if HAS_WEIGHT:
            value *= tl.load(weight + row, mask=valid, other=0.0)[:, None]
        total += value
        first += tl.num_programs(2) * ROWS
    to = out + (share * tl.num_programs(0) + expert).to(tl.int64) * C + column
    tl.store(to, tl.sum(total, axis=0), mask=inside)


def activate(
    h: torch.Tensor,
    weight: torch.Tensor,
    form: ActivationForm,
    bias: torch.Tensor | None = None,
    expert: torch.Tensor | None = None,
    used: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(gate + bias, up + bias) * weight.

    Args:
        h: [M, 2F], gate then up, before the bias; [M, F] for a form of one part.
        weight: FP32 [M].
        bias: [E, 2F] or [E, F], with `expert`, int [M], the expert of each row.
        used: int32 [1], where fewer than the M rows are used: how many; the others stay undefined.

    Returns:
        [M, F] in the dtype of `h`.
    """
    rows, width = h.shape[0], h.shape[1] // form.parts
    out = h.new_empty(rows, width)
    if rows:
        block = triton.next_power_of_2(width)
        _activate[(_programs(rows, used),)](
            h, bias, expert, weight, out, used, form.alpha, form.limit,
            width, form.parts, block, form.kind, bias is not None, used is not None, num_warps=_warps(block),
        )  # fmt: skip
    return out


def activate_backward(
    h: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    form: ActivationForm,
    bias: torch.Tensor | None = None,
    expert: torch.Tensor | None = None,
    used: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of `h` [M, 2F], the output of `activate` times `scale` [M, F], and the gradient of `weight` [M].

    The gradient has all gates first, also where `h` has gate and up in turn, in BF16 or FP32.
    """
    grad_h, out, grad_weight = torch.empty_like(h), torch.empty_like(grad), torch.empty_like(weight)
    rows, width = grad.shape
    if rows:
        block = triton.next_power_of_2(width)
        words = h.view(torch.int32 if h.dtype == torch.bfloat16 else torch.int64) if form.in_turn else h
        _activate_backward[(_programs(rows, used),)](
            words, bias, expert, weight, grad, grad_h, out, grad_weight, used, form.alpha, form.limit, scale,
            width, form.parts, block, form.kind, bias is not None, form.in_turn, used is not None,
            num_warps=_warps(block),
        )  # fmt: skip
    return grad_h, out, grad_weight


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """rows[index], [len(index), C]; rows are contiguous."""
    count, columns = len(index), rows.shape[1]
    out = rows.new_empty(count, columns)
    if count:
        block = triton.next_power_of_2(columns)
        at_once = max(1, min(8, 8192 // block))
        grid = (triton.cdiv(count, at_once),)
        _gather_rows[grid](rows, index, out, count, columns, at_once, block, num_warps=8)
    return out


def spread_rows(x: torch.Tensor, index: torch.Tensor, top_k: int) -> torch.Tensor:
    """Each token's row at the K places that are its own: out[index[n * K + k]] = x[n], [N * K, C].

    Args:
        x: [N, C], contiguous.
        index: int [N * K], a permutation.
    """
    tokens, columns = x.shape
    out = x.new_empty(tokens * top_k, columns)
    if tokens:
        block = triton.next_power_of_2(columns)
        _spread_rows[(tokens,)](x, index, out, columns, top_k, block, num_warps=_warps(block))
    return out


def sum_rows(
    rows: torch.Tensor,
    index: torch.Tensor,
    top_k: int,
    *,
    factor: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """For each token the sum of its rows: out[n] = sum over k of rows[index[n * K + k]], in FP32, [N, C].

    Args:
        rows: [M, C].
        index: int [N * K]; where it is M or more there is no row.
        factor: FP32 [M], times which each row counts.
        bias: [E, C]; each row also counts `weight` (FP32 [M]) times the bias of its `expert` (int [M]).
    """
    tokens, columns = index.numel() // top_k, rows.shape[1]
    out = rows.new_empty(tokens, columns)
    if tokens:
        block = triton.next_power_of_2(columns)
        _sum_rows[(tokens,)](
            rows, index, factor, weight, bias, expert, out, len(rows),
            columns, top_k, block, factor is not None, bias is not None, num_warps=_warps(block),
        )  # fmt: skip
    return out


def add_dot_with_bias(
    out: torch.Tensor,
    rows: torch.Tensor,
    bias: torch.Tensor,
    expert: torch.Tensor,
    used: torch.Tensor | None = None,
) -> None:
    """out[m] += the dot product of rows[m] and the bias of its expert; FP32 [M], of which the first `used` count."""
    if len(rows):
        columns = rows.shape[1]
        block = triton.next_power_of_2(columns)
        _dot_with_bias[(len(rows),)](
            rows, bias, expert, out, used, columns, block, used is not None, num_warps=_warps(block)
        )


def sum_by_expert(rows: torch.Tensor, ends: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """[E, C]: the sum of each expert's rows, each times its `weight` (FP32 [M]) where one is given, in FP32."""
    columns = rows.shape[1]
    shares = rows.new_empty(_SHARES, len(ends), columns, dtype=torch.float32)
    block = min(128, triton.next_power_of_2(columns))
    if len(ends):
        grid = (len(ends), triton.cdiv(columns, block), _SHARES)
        _sum_by_expert[grid](rows, weight, ends, shares, columns, 32, block, weight is not None, num_warps=4)
    return shares.sum(0).to(rows.dtype)


def _programs(rows: int, used: torch.Tensor | None) -> int:
    return rows if used is None else min(rows, _LIMITED_PROGRAMS)


def _warps(block: int) -> int:
    """16 bytes of BF16 a thread, between 1 and 16 warps."""
    return max(1, min(16, block // 256))
