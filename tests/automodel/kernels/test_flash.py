"""Attention within documents, windows and with sinks, against softmax attention under a mask.

Without a GPU the reference is checked, and TransformerEngine's by a stand-in; on one, every kernel that can run there.
"""

from __future__ import annotations

import pytest
import torch

from automodel.kernels.flash import Spans, causal_attention, document_starts, flash4_obstacle, flash_obstacle
from automodel.kernels.packages import is_installed
from tests.automodel.te_stand_in import stand_in  # noqa: F401

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS = ["reference", *(["flash", "cudnn"] if ON_GPU else [])]
if not ON_GPU or is_installed("transformer_engine"):
    KERNELS.append("te")
if ON_GPU and is_installed("flash_attn.cute"):
    KERNELS.append("flash4")
ROWS, LENGTH, HEADS, GROUPS, SIZE = 2, 200, 8, 2, 64
LENGTHS = [[200], [120, 80]], [[7, 1, 192], [64, 64, 72]]


def positions(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).to(DEVICE)


def masked(query, key, value, seen, sinks, scale):
    """Softmax attention in FP64 under a mask [B, S, S]."""
    query, key, value = (t.double().transpose(1, 2) for t in (query, key, value))
    key, value = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~seen.unsqueeze(1), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    share = scores.softmax(-1)[..., : key.shape[2]]
    return (share @ value).transpose(1, 2)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [0, 2, 33])
@pytest.mark.parametrize("packed", [None, 0, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_are_those_of_attention_under_a_mask(request, kernel, packed, window, sinks) -> None:
    if kernel == "te" and not ON_GPU:
        request.getfixturevalue("stand_in")
    if kernel == "cudnn" and (packed is not None or window):
        pytest.skip("cuDNN's kernel is used for whole rows")
    torch.manual_seed(0)
    dtype = torch.float32 if kernel == "reference" else torch.bfloat16
    shapes = [(ROWS, LENGTH, n, SIZE) for n in (HEADS, GROUPS, GROUPS)]
    inputs = [torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_() for shape in shapes]
    sink = torch.randn(HEADS, device=DEVICE).requires_grad_() if sinks else None
    back = torch.arange(LENGTH, device=DEVICE).unsqueeze(1) - torch.arange(LENGTH, device=DEVICE)
    seen = ((back >= 0) & (back < (window or LENGTH))).expand(ROWS, -1, -1)
    spans = Spans(None, LENGTH, window, kernel)
    if packed is not None:
        at = positions(LENGTHS[packed])
        document = (at == 0).cumsum(1)
        seen = seen & (document.unsqueeze(2) == document.unsqueeze(1))
        spans = Spans(*document_starts(at), window, kernel)
    expected = masked(*inputs, seen, sink, 0.3)
    actual = causal_attention(*inputs, spans, scale=0.3, sinks_H=sink)
    grad = torch.randn_like(expected)
    leaves = [*inputs, sink] if sinks else inputs
    mine = torch.autograd.grad(actual, leaves, grad.to(dtype))
    theirs = torch.autograd.grad(expected, leaves, grad)
    tolerance = 1e-5 if kernel == "reference" else 2e-2
    for a, b in zip((actual, *mine), (expected, *theirs), strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


def test_documents_begin_where_positions_do_not_count_on() -> None:
    starts, longest = document_starts(positions([[3, 5], [8]]))
    assert starts.tolist() == [0, 3, 8, 16]
    assert starts.dtype == torch.int32
    assert longest == 8
    assert document_starts(positions([[3, 5], [4, 4]]))[1] == 8
    assert document_starts(torch.tensor([[5, 6, 9, 10, 11]]))[0].tolist() == [0, 2, 5]


def test_the_operation_obeys_the_rules_of_torch() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 16, n, 8, device=DEVICE, requires_grad=True) for n in (4, 2, 2)]
    sinks = torch.randn(4, device=DEVICE, requires_grad=True)
    starts = torch.tensor([0, 5, 16], dtype=torch.int32, device=DEVICE)
    arguments = (*inputs, sinks, starts, 16, 4, 0.3, "reference")
    torch.library.opcheck(torch.ops.automodel.causal_attention.default, arguments)


def test_obstacles_name_what_is_missing() -> None:
    assert flash_obstacle(torch.device("cpu"), torch.bfloat16, 64) == "flash attention needs CUDA"
    cuda = torch.device("cuda", 0)
    assert "float32" in flash_obstacle(cuda, torch.float32, 64)
    assert "not of 20" in flash_obstacle(cuda, torch.bfloat16, 20)
    assert flash_obstacle(cuda, torch.bfloat16, 64) is None
    if not is_installed("flash_attn.cute"):
        assert "flash-attn-4" in flash4_obstacle(cuda, torch.bfloat16, 64)
