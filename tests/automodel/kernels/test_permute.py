"""Sorting rows by expert and combining them again, with gradients that gather."""

from __future__ import annotations

import torch

from automodel.kernels.permute import combine_rows, rows_by_expert, sort_by_expert

INDEX_NK = torch.tensor([[3, 0], [0, 3], [3, 1], [0, 1], [3, 0]])


def test_rows_are_grouped_by_expert_in_token_order() -> None:
    order = sort_by_expert(INDEX_NK, num_experts=5)
    assert order.counts_E.tolist() == [4, 2, 0, 4, 0]
    assert order.counts_E.dtype == torch.int32
    x_ND = torch.arange(5.0)[:, None]
    rows = rows_by_expert(x_ND, order)[:, 0].tolist()
    assert rows == [0, 1, 3, 4, 2, 3, 0, 1, 2, 4]


def test_combining_undoes_sorting() -> None:
    order = sort_by_expert(INDEX_NK, num_experts=4)
    x_ND = torch.randn(5, 6)
    weight_NK = torch.rand(5, 2)
    combined = combine_rows(rows_by_expert(x_ND, order), weight_NK, order)
    torch.testing.assert_close(combined, x_ND * weight_NK.sum(1, keepdim=True))


def test_gradients_pass_gradcheck() -> None:
    order = sort_by_expert(INDEX_NK, num_experts=4)
    scale = torch.linspace(1, 2, 10, dtype=torch.float64)[:, None]
    x_ND = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight_NK = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: combine_rows(rows_by_expert(x, order) * scale, w, order), (x_ND, weight_NK)
    )


def test_float32_weights_are_applied_before_rounding() -> None:
    order = sort_by_expert(torch.tensor([[0]]), num_experts=1)
    rows = torch.tensor([[3.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[1 / 3 + 1e-3]])
    assert combine_rows(rows, weight, order).dtype == torch.bfloat16
    assert combine_rows(rows, weight, order).item() == (rows.float() * weight).to(torch.bfloat16).item()


def test_no_tokens_are_no_rows() -> None:
    order = sort_by_expert(torch.empty(0, 2, dtype=torch.int64), num_experts=3)
    x_ND = torch.empty(0, 4, requires_grad=True)
    out = combine_rows(rows_by_expert(x_ND, order), torch.empty(0, 2), order)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert x_ND.grad.shape == (0, 4)
