"""The experts of a layer over the processes of one host, without the host waiting for a device.

One autograd function: tokens are fetched from the memory of their processes, go through the experts held here, and
their sums return the same way. The host never learns how many rows an expert has: buffers of rows have the size of the
worst case, in which every token of the group chooses as many experts here as it can. Where that is much more than an
even load, none of them outlives the forward pass, and the first projection is computed again in the backward pass.

Legend: W processes, N tokens of this process, T tokens of the process that has most, K experts a token, D hidden,
E experts held here, M = W * T * min(K, E) rows at most, S = W - 1 other processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import FunctionCtx

from automodel.kernels import triton_peers, triton_rows
from automodel.kernels.products import Products, products_obstacle
from automodel.kernels.triton_peers import Placement
from automodel.kernels.triton_rows import ActivationForm
from automodel.moe.peers import Peers

_ALIGNMENT = 256
_KEPT_LOAD = 2
"""The first projection's output is kept for the backward pass where the worst case is up to so many even loads."""


@dataclass(frozen=True, slots=True)
class ExpertsOfPeers:
    """How the experts of a layer are divided over a group.

    Attributes:
        peers: the processes' memory.
        chunk: experts of each process; the last ones may hold fewer, or none.
        held: experts of this process.
        form: of the activation.
    """

    peers: Peers
    chunk: int
    held: int
    form: ActivationForm

    @property
    def gradient_scale(self) -> float:
        """On the gradients of the experts: they are sums over the group, where data parallelism expects a mean."""
        return 1 / self.peers.size


def experts_of_peers(
    x_ND: torch.Tensor,
    index_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    layer: ExpertsOfPeers,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    gate_up_bias_E2F: torch.Tensor | None = None,
    down_bias_ED: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight * down(activation(gate(x), up(x))), summed over the K experts of each token, wherever they are: [N, D].

    All processes of the group call it together; N may differ between them. Parameters are those of the experts held
    here, and their gradients are already times `layer.gradient_scale`.
    """
    tokens = layer.peers.greatest(len(x_ND))
    if not tokens:
        return x_ND * 1
    out: torch.Tensor = _ExpertsOfPeers.apply(
        x_ND.contiguous(),
        weight_NK.contiguous(),
        gate_up_E2FD,
        down_EDF,
        gate_up_bias_E2F,
        down_bias_ED,
        index_NK.contiguous(),
        layer,
        tokens,
    )
    return out


class _ExpertsOfPeers(torch.autograd.Function):
    """Each pass is one exchange outward and one homeward, which is what makes reuse of the peers' buffers safe."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        index: torch.Tensor,
        layer: ExpertsOfPeers,
        tokens: int,
    ) -> torch.Tensor:
        exchange = _Exchange(layer, tokens, index.shape[1], x)
        biased = gate_up_bias is not None or down_bias is not None
        placement = exchange.send_tokens(x, index, weight, with_expert=biased)
        rows, fetched = exchange.fetch(x, placement, keep=True)
        ends, used = placement.ends_E, placement.ends_E[-1:]
        products = _products(ends, down)
        h = products.by_row(rows, gate_up.mT)
        del rows
        activated = triton_rows.activate(h, placement.weight_M, layer.form, gate_up_bias, placement.expert_M, used)
        rows = products.by_row(activated, down.mT)
        del activated
        ctx.save_for_backward(
            x, weight, fetched, index, h if exchange.keeps_projected else None, gate_up, down, gate_up_bias, down_bias,
            placement.place_WTK, placement.weight_M, ends, placement.expert_M,
        )  # fmt: skip
        ctx.layer, ctx.tokens = layer, tokens
        exchange.send_sums(rows, placement, down_bias)
        return exchange.collect(rows, placement, index, down_bias)[0]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, fetched, index, h, gate_up, down, gate_up_bias, down_bias, *placed = ctx.saved_tensors
        placement, layer, needs = Placement(*placed), ctx.layer, ctx.needs_input_grad
        exchange = _Exchange(layer, ctx.tokens, index.shape[1], x)
        scale, ends, used = layer.gradient_scale, placement.ends_E, placement.ends_E[-1:]
        products = _products(ends, down)
        grads: list[torch.Tensor | None] = [None] * len(needs)

        grad = grad.contiguous()
        exchange.send_gradients(grad)
        if h is None:
            rows = exchange.rows_again(x, fetched, placement, 1.0)
            h = products.by_row(rows, gate_up.mT)
            del rows
        grad_rows, _ = exchange.fetch(grad, placement, keep=False)
        grad_h, activated, grad_weight = triton_rows.activate_backward(
            h, placement.weight_M, products.by_row(grad_rows, down), layer.form,
            gate_up_bias, placement.expert_M, used, scale,
        )  # fmt: skip
        if needs[3]:
            grads[3] = products.over_rows(grad_rows, activated)
        if needs[5]:
            grads[5] = triton_rows.sum_by_expert(grad_rows, ends, placement.weight_M) * scale
        if down_bias is not None:
            triton_rows.add_dot_with_bias(grad_weight, grad_rows, down_bias, placement.expert_M, used)
        del grad_rows, activated, h
        grad_rows = products.by_row(grad_h, gate_up)
        exchange.send_sums(grad_rows, placement, None, grad_weight)
        # Between sending and collecting, so that a process that is late keeps nobody waiting.
        if needs[2]:
            grads[2] = products.over_rows(exchange.rows_again(x, fetched, placement, scale), grad_h, transposed=True)
        if needs[4]:
            grads[4] = triton_rows.sum_by_expert(grad_h, ends) * scale
        grads[0], grads[1] = exchange.collect(grad_rows, placement, index, None, grad_weight, weight.dtype)
        return tuple(grads)


def _products(ends_E: torch.Tensor, down_EDF: torch.Tensor) -> Products:
    return Products.of(ends_E, quack=products_obstacle(down_EDF.device, down_EDF.dtype, *down_EDF.shape[1:]) is None)


class _Exchange:
    """One exchange outward and one homeward: where in the peers' buffers things lie, and what moves them."""

    def __init__(self, layer: ExpertsOfPeers, tokens: int, top_k: int, like_ND: torch.Tensor) -> None:
        self.layer, self.peers = layer, layer.peers
        self.tokens, self.top_k, self.columns, self.dtype = tokens, top_k, like_ND.shape[1], like_ND.dtype
        self.bound = self.peers.size * tokens * min(top_k, layer.held)
        token_bytes, choice_bytes = _aligned(tokens * self.columns * self.dtype.itemsize), _aligned(4 * tokens * top_k)
        others = self.peers.size - 1
        self.index_at, self.weight_at = token_bytes, token_bytes + choice_bytes
        self.gradient_at = _aligned(others * tokens * self.columns * self.dtype.itemsize)
        self.out = self.peers.outward(token_bytes + 2 * choice_bytes)
        self.home = self.peers.homeward(max(self.gradient_at + _aligned(4 * others * tokens * top_k), _ALIGNMENT))

    @property
    def keeps_projected(self) -> bool:
        return self.bound <= _KEPT_LOAD * self.tokens * self.top_k

    def send_tokens(
        self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, *, with_expert: bool
    ) -> Placement:
        """Show the tokens and their choices to the others, and find the rows of all tokens among the experts here."""
        table, rank, offsets = self.out.table, self.peers.rank, (self.index_at, self.weight_at)
        triton_peers.publish(x, table, rank, self.tokens, (index, weight), offsets)
        self.out.barrier()
        first, held = rank * self.layer.chunk, self.layer.held
        return triton_peers.place_tokens(table, *offsets, self.tokens, self.top_k, first, held, with_expert=with_expert)

    def send_gradients(self, grad: torch.Tensor) -> None:
        """Show the gradients of the tokens' results to the others."""
        triton_peers.publish(grad, self.out.table, self.peers.rank, self.tokens)
        self.out.barrier()

    def fetch(self, own: torch.Tensor, placement: Placement, *, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What was sent, as rows sorted by expert; and as it came, for `rows_again`."""
        kept = own.new_empty(self.peers.size - 1, self.tokens, self.columns) if keep else None
        rows = triton_peers.spread(
            own, placement.place_WTK, self.peers.rank, self.bound, table_W=self.out.table, kept_STD=kept
        )
        return rows, kept

    def rows_again(self, own: torch.Tensor, kept: torch.Tensor, placement: Placement, scale: float) -> torch.Tensor:
        """The rows of `fetch`, times `scale`."""
        return triton_peers.spread(own, placement.place_WTK, self.peers.rank, self.bound, kept_STD=kept, scale=scale)

    def send_sums(
        self,
        rows: torch.Tensor,
        placement: Placement,
        bias: torch.Tensor | None,
        grad_weight: torch.Tensor | None = None,
    ) -> None:
        """Add up the rows of the others' tokens where they will collect them."""
        triton_peers.sum_for_peers(
            rows,
            placement,
            self.peers.rank,
            self.home.table,
            bias=bias,
            grad_weight_M=grad_weight,
            weight_offset=self.gradient_at,
        )

    def collect(
        self,
        rows: torch.Tensor,
        placement: Placement,
        index: torch.Tensor,
        bias: torch.Tensor | None,
        grad_weight: torch.Tensor | None = None,
        weight_dtype: torch.dtype = torch.float32,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sums of this process's tokens over all processes, and the gradients of their weights."""
        self.home.barrier()
        return triton_peers.sum_own(
            rows,
            placement,
            self.peers.rank,
            index,
            self.layer.chunk,
            self.home.table,
            bias=bias,
            grad_weight_M=grad_weight,
            weight_offset=self.gradient_at,
            weight_dtype=weight_dtype,
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
