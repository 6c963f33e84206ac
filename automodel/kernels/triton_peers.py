"""Triton kernels of expert parallelism through peers' memory: who goes where, rows fetched, results brought home.

Every process works out by itself where each token of the group goes among its own experts, from the choices that the
others published. A token crosses between two processes once in each direction, however many experts it has there:
it is fetched once and written to all its rows, and its results are added up before they leave. Peers' buffers are
given as a table of addresses; nothing waits for the device, and all sums are in one order.

Legend: W processes, T tokens of one process (the largest number among them), K experts a token, P = T * K pairs of one
process, E experts held here, M rows sorted by expert, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_TILE = 8192
"""Elements of a block's pairs times experts."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which rows the group's tokens have among this process's experts.

    Attributes:
        place_WTK: int32 row of each choice of each token; -1 where another process holds the expert, or no token is.
        weight_M: FP32 routing weight of each row. Rows from the last of `ends_E` on are unused.
        ends_E: int32, where each expert's rows end.
        expert_M: int32 expert of each row, if asked for.
    """

    place_WTK: torch.Tensor
    weight_M: torch.Tensor
    ends_E: torch.Tensor
    expert_M: torch.Tensor | None


@triton.jit
def _publish(
    x, index, weight, table, index_offset, weight_offset, rank, tokens,
    C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, CHOICES: tl.constexpr, WITH_CHOICES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    own = tl.load(table + rank)
    if token < tokens:
        column = tl.arange(0, BLOCK)
        to = tl.multiple_of(own.to(tl.pointer_type(x.dtype.element_ty)), 16)
        tl.store(to + token * C + column, tl.load(x + token * C + column, mask=column < C), mask=column < C)
    if WITH_CHOICES:
        choice = tl.arange(0, CHOICES)
        pair = token * K + choice
        there = (choice < K) & (token < tokens)
        to_index = (own + index_offset).to(tl.pointer_type(tl.int32))
        to_weight = (own + weight_offset).to(tl.pointer_type(tl.float32))
        tl.store(to_index + pair, tl.load(index + pair, mask=there, other=-1).to(tl.int32), mask=choice < K)
        tl.store(to_weight + pair, tl.load(weight + pair, mask=there, other=0.0).to(tl.float32), mask=choice < K)


@triton.jit
def _count_choices(
    table, offset, place, counts, pairs, first, E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    block, source = tl.program_id(0), tl.program_id(1)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    chosen = (tl.load(table + source) + offset).to(tl.pointer_type(tl.int32))
    here = tl.load(chosen + pair, mask=pair < pairs, other=-1) - first
    here = tl.where((pair < pairs) & (here >= 0) & (here < E), here, -1)
    tl.store(place + source.to(tl.int64) * pairs + pair, here, mask=pair < pairs)
    bins = tl.arange(0, BINS)
    count = tl.sum((here[:, None] == bins[None, :]).to(tl.int32), axis=0)
    blocks = tl.num_programs(0)
    tl.store(counts + bins * (blocks * tl.num_programs(1)) + source * blocks + block, count, mask=bins < E)


@triton.jit
def _scan_counts(counts, totals, blocks, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    own = counts + expert * blocks + block
    count = tl.load(own, mask=block < blocks, other=0)
    tl.store(own, tl.cumsum(count, 0) - count, mask=block < blocks)
    tl.store(totals + expert, tl.sum(count))


@triton.jit
def _place_pairs(
    place, before, totals, table, offset, weight, expert_of_row, ends, pairs,
    E: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, WITH_EXPERT: tl.constexpr,
):  # fmt: skip
    block, source = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    bins = tl.arange(0, BINS)
    total = tl.load(totals + bins, mask=bins < E, other=0)
    end = tl.cumsum(total, 0)
    if block + source == 0:
        tl.store(ends + bins, end, mask=bins < E)
    own = before + bins * (blocks * tl.num_programs(1)) + source * blocks + block
    first = end - total + tl.load(own, mask=bins < E, other=0)

    pair = block * BLOCK + tl.arange(0, BLOCK)
    of_source = source.to(tl.int64) * pairs
    # The expert, from `_count_choices`; the row takes its place.
    here = tl.load(place + of_source + pair, mask=pair < pairs, other=-1)
    mine = here[:, None] == bins[None, :]
    one = mine.to(tl.int32)
    rows = tl.where(mine, tl.cumsum(one, 0) - one + first[None, :], 0)
    row = tl.where(here >= 0, tl.sum(rows, axis=1), -1)
    tl.store(place + of_source + pair, row, mask=pair < pairs)
    given = (tl.load(table + source) + offset).to(tl.pointer_type(tl.float32))
    tl.store(weight + row, tl.load(given + pair, mask=here >= 0), mask=here >= 0)
    if WITH_EXPERT:
        tl.store(expert_of_row + row, here, mask=here >= 0)


@triton.jit
def _spread_tokens(
    own, table, kept, place, out, rank, tokens, scale, C: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, CHOICES: tl.constexpr, FETCH: tl.constexpr, KEEP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read from different processes, so that all links and the own memory are busy together.
    token = (tl.program_id(0) // W).to(tl.int64)
    source = tl.program_id(0) % W
    choice = tl.arange(0, CHOICES)
    pair = (source * tokens + token) * K
    if tl.max(tl.load(place + pair + choice, mask=choice < K, other=-1)) >= 0:
        column = tl.arange(0, BLOCK)
        inside = column < C
        if source == rank:
            value = tl.load(own + token * C + column, mask=inside)
        else:
            stored = (((source - rank - 1 + W) % W) * tokens + token) * C + column
            if FETCH:
                theirs = tl.load(table + source).to(tl.pointer_type(own.dtype.element_ty))
                theirs = tl.multiple_of(theirs, 16)
                value = tl.load(theirs + token * C + column, mask=inside)
                if KEEP:
                    tl.store(kept + stored, value, mask=inside)
            else:
                value = tl.load(kept + stored, mask=inside)
        if SCALED:
            value = (value.to(tl.float32) * scale).to(own.dtype.element_ty)
        for k in tl.static_range(K):
            row = tl.load(place + pair + k).to(tl.int64)
            tl.store(out + row * C + column, value, mask=inside & (row >= 0))


@triton.jit
def _sum_rows_here(
    rows, place, pair, column, inside, weight, bias, expert,
    C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The sum of the rows that a token has here, in FP32; each with its weight times its expert's bias."""
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(place + pair + k).to(tl.int64)
        there = inside & (row >= 0)
        total += tl.load(rows + row * C + column, mask=there, other=0.0).to(tl.float32)
        if HAS_BIAS:
            own = bias + tl.load(expert + row, mask=row >= 0, other=0).to(tl.int64) * C + column
            total += tl.load(weight + row, mask=row >= 0, other=0.0) * tl.load(own, mask=there, other=0.0).to(
                tl.float32
            )
    return total


@triton.jit
def _sum_for_peers(
    rows, place, weight, bias, expert, grad_weight, table, weight_offset, rank, tokens,
    C: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, CHOICES: tl.constexpr, HAS_BIAS: tl.constexpr, WITH_WEIGHT: tl.constexpr,
):  # fmt: skip
    token, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    source = (rank + 1 + slot) % W
    choice = tl.arange(0, CHOICES)
    pair = (source * tokens + token) * K
    row = tl.load(place + pair + choice, mask=choice < K, other=-1)
    if tl.max(row) >= 0:
        column = tl.arange(0, BLOCK)
        inside = column < C
        total = _sum_rows_here(rows, place, pair, column, inside, weight, bias, expert, C, K, BLOCK, HAS_BIAS)
        own = tl.load(table + rank)
        out = tl.multiple_of(own.to(tl.pointer_type(rows.dtype.element_ty)), 16)
        to = slot * tokens + token
        tl.store(out + to * C + column, total.to(rows.dtype.element_ty), mask=inside)
        if WITH_WEIGHT:
            out_weight = (own + weight_offset).to(tl.pointer_type(tl.float32))
            value = tl.load(grad_weight + row, mask=row >= 0, other=0.0)
            tl.store(out_weight + to * K + choice, value, mask=choice < K)


@triton.jit
def _sum_own(
    rows, place, index, weight, bias, expert, grad_weight, table, weight_offset, out, out_weight, rank, tokens, chunk,
    C: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, CHOICES: tl.constexpr, HAS_BIAS: tl.constexpr, WITH_WEIGHT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, CHOICES)
    column = tl.arange(0, BLOCK)
    inside = column < C
    pair = (rank * tokens + token) * K
    # Without a choice there is no owner: integers are divided towards zero.
    owner = tl.load(index + token * K + choice, mask=choice < K, other=0).to(tl.int32) // chunk
    owner = tl.where(choice < K, owner, -1)
    total = _sum_rows_here(rows, place, pair, column, inside, weight, bias, expert, C, K, BLOCK, HAS_BIAS)
    for peer in tl.static_range(W):
        theirs = tl.load(table + peer).to(tl.pointer_type(out.dtype.element_ty))
        theirs = tl.multiple_of(theirs, 16)
        slot = (rank - peer - 1 + W) % W
        needed = (tl.sum((owner == peer).to(tl.int32)) > 0) & (peer != rank)
        at = (slot * tokens + token) * C + column
        total += tl.load(theirs + at, mask=inside & needed, other=0.0).to(tl.float32)
    tl.store(out + token * C + column, total.to(out.dtype.element_ty), mask=inside)
    if WITH_WEIGHT:
        row = tl.load(place + pair + choice, mask=choice < K, other=-1)
        here = tl.load(grad_weight + row, mask=row >= 0, other=0.0)
        away = (choice < K) & (row < 0)
        theirs = (tl.load(table + owner, mask=away, other=0) + weight_offset).to(tl.pointer_type(tl.float32))
        at = (((rank - owner - 1 + W) % W) * tokens + token) * K + choice
        value = tl.where(row >= 0, here, tl.load(theirs + at, mask=away, other=0.0))
        tl.store(out_weight + token * K + choice, value.to(out_weight.dtype.element_ty), mask=choice < K)


def publish(
    x_ND: torch.Tensor,
    table_W: torch.Tensor,
    rank: int,
    tokens: int,
    choices: tuple[torch.Tensor, torch.Tensor] | None = None,
    offsets: tuple[int, int] = (0, 0),
) -> None:
    """Copy this process's tokens to its own buffer, where the others read.

    Args:
        x_ND: N tokens, contiguous.
        table_W: int64 addresses of the processes' buffers.
        tokens: T, at least N; the choices from N on say that there is no token.
        choices: the experts and the routing weights [N, K], copied as int32 and FP32 [T, K].
        offsets: bytes into the buffer where those two begin.
    """
    count, columns = x_ND.shape
    index, weight = choices or (None, None)
    top_k = 1 if index is None else index.shape[1]
    block = triton.next_power_of_2(columns)
    programs = count if index is None else tokens
    if programs:
        _publish[(programs,)](
            x_ND, index, weight, table_W, *offsets, rank, count,
            columns, top_k, block, triton.next_power_of_2(top_k), index is not None, num_warps=_warps(block),
        )  # fmt: skip


def place_tokens(
    table_W: torch.Tensor,
    index_offset: int,
    weight_offset: int,
    tokens: int,
    top_k: int,
    first: int,
    experts: int,
    *,
    with_expert: bool,
) -> Placement:
    """Sort all (token, choice) pairs of the group whose expert is one of `first` to `first + experts - 1`.

    The order is that of the experts, and within one that of processes, tokens and choices.

    Args:
        table_W: int64 addresses of the processes' buffers.
        index_offset, weight_offset: bytes from there to the choices, int32 [T, K], and to their weights, FP32 [T, K].
        with_expert: also say the expert of each row.
    """
    processes, pairs, device = len(table_W), tokens * top_k, table_W.device
    place = torch.empty(processes, tokens, top_k, dtype=torch.int32, device=device)
    bound = processes * tokens * min(top_k, experts)
    weight = torch.empty(bound, dtype=torch.float32, device=device)
    expert_of_row = torch.empty(bound if with_expert else 0, dtype=torch.int32, device=device)
    if not experts:
        return Placement(place.fill_(-1), weight, place.new_empty(0), expert_of_row if with_expert else None)
    bins = triton.next_power_of_2(experts)
    block = max(16, _TILE // bins)
    blocks = triton.cdiv(pairs, block)
    counts = torch.empty(experts, processes * blocks, dtype=torch.int32, device=device)
    totals, ends = torch.empty(2, experts, dtype=torch.int32, device=device)
    grid = (blocks, processes)
    _count_choices[grid](table_W, index_offset, place, counts, pairs, first, experts, bins, block, num_warps=4)
    across = triton.next_power_of_2(processes * blocks)
    _scan_counts[(experts,)](counts, totals, processes * blocks, across, num_warps=max(1, min(16, across // 256)))
    _place_pairs[grid](
        place, counts, totals, table_W, weight_offset, weight, expert_of_row, ends, pairs,
        experts, bins, block, with_expert, num_warps=4,
    )  # fmt: skip
    return Placement(place, weight, ends, expert_of_row if with_expert else None)


def spread(
    own_ND: torch.Tensor,
    place_WTK: torch.Tensor,
    rank: int,
    rows: int,
    *,
    table_W: torch.Tensor | None = None,
    kept_STD: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Every token of the group at its rows here, times `scale`: [rows, C]; rows that no token has are undefined.

    Args:
        own_ND: this process's tokens, contiguous.
        table_W: addresses of the others' tokens, from where they are fetched; without, they come from `kept_STD`.
        kept_STD: [W - 1, T, C]; with `table_W` what is fetched is stored here, if given.
    """
    processes, tokens, top_k = place_WTK.shape
    columns = own_ND.shape[1]
    out = own_ND.new_empty(rows, columns)
    if rows:
        block, choices = triton.next_power_of_2(columns), triton.next_power_of_2(top_k)
        _spread_tokens[(processes * tokens,)](
            own_ND, table_W, kept_STD, place_WTK, out, rank, tokens, scale, columns, top_k, processes,
            block, choices, table_W is not None, kept_STD is not None, scale != 1.0, num_warps=_warps(block),
        )  # fmt: skip
    return out


def sum_for_peers(
    rows_MD: torch.Tensor,
    placement: Placement,
    rank: int,
    table_W: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    grad_weight_M: torch.Tensor | None = None,
    weight_offset: int = 0,
) -> None:
    """For each token of the other processes the sum of its rows here, in this process's buffer, for `sum_own` there.

    The buffer holds [W - 1, T, C] in the dtype of the rows, for the processes after this one in turn; tokens without
    rows here are left out.

    Args:
        table_W: int64 addresses of the processes' buffers.
        bias: [E, C], of which each row counts its weight times that of its expert.
        grad_weight_M: FP32, given to the tokens' processes too, [W - 1, T, K] from `weight_offset` bytes on.
    """
    processes, tokens, top_k = placement.place_WTK.shape
    if len(rows_MD) and processes > 1:
        columns = rows_MD.shape[1]
        block, choices = triton.next_power_of_2(columns), triton.next_power_of_2(top_k)
        _sum_for_peers[(tokens, processes - 1)](
            rows_MD, placement.place_WTK, placement.weight_M, bias, placement.expert_M, grad_weight_M,
            table_W, weight_offset, rank, tokens, columns, top_k, processes, block, choices,
            bias is not None, grad_weight_M is not None, num_warps=_warps(block),
        )  # fmt: skip


def sum_own(
    rows_MD: torch.Tensor,
    placement: Placement,
    rank: int,
    index_NK: torch.Tensor,
    chunk: int,
    table_W: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    grad_weight_M: torch.Tensor | None = None,
    weight_offset: int = 0,
    weight_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """For each token of this process, the sum of its rows here and of what `sum_for_peers` made of it elsewhere.

    Args:
        index_NK: expert of each choice of this process's tokens; `chunk` experts are held by each process.
        table_W, weight_offset, bias, grad_weight_M: as for `sum_for_peers`.

    Returns:
        [N, C] in the dtype of the rows; with `grad_weight_M` also the gradient of each choice's weight [N, K].
    """
    processes, tokens, top_k = placement.place_WTK.shape
    count, columns = len(index_NK), rows_MD.shape[1]
    out = rows_MD.new_empty(count, columns)
    out_weight = None if grad_weight_M is None else rows_MD.new_empty(count, top_k, dtype=weight_dtype)
    if count:
        block, choices = triton.next_power_of_2(columns), triton.next_power_of_2(top_k)
        _sum_own[(count,)](
            rows_MD, placement.place_WTK, index_NK, placement.weight_M, bias, placement.expert_M, grad_weight_M,
            table_W, weight_offset, out, out_weight, rank, tokens, chunk, columns, top_k, processes, block, choices,
            bias is not None, grad_weight_M is not None, num_warps=_warps(block),
        )  # fmt: skip
    return out, out_weight


def _warps(block: int) -> int:
    """16 bytes of BF16 a thread, between 1 and 16 warps."""
    return max(1, min(16, block // 256))
