"""The language-model head and its loss as one operation, by chunks of tokens: logits never exist as a whole.

The gradients of hidden states and head are computed with the loss, while a chunk's logits are there; the backward pass
only scales them. The softmax of a chunk and its gradient are one Triton kernel where Triton runs.

Legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

from automodel.kernels.packages import is_installed

_CHUNK_BYTES = 1600 << 20
"""Logits of a chunk: 4,096 tokens of a vocabulary of 201,088 in BF16. Products gain by size until about 4,096 tokens of
152,000; fewer chunks add up fewer gradients of the head."""


def fused_loss_obstacle(device: torch.device) -> str | None:
    """Why the loss is not computed by chunks, or None where it is."""
    if device.type != "cuda":
        return "the fused loss needs CUDA"
    return None if is_installed("triton") else "the fused loss needs triton, which is not installed"


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    divisor: torch.Tensor,
    *,
    ignore_index: int = -100,
    chunk_bytes: int = _CHUNK_BYTES,
) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T`, summed over the tokens that count, over `divisor`; FP32, 0-d.

    Logits have the dtype of `hidden_ND`, their softmax is computed in FP32. The gradient of the head is summed in FP32
    where there are several chunks.

    Args:
        labels_N: int64, token to predict; `ignore_index` does not count.
        divisor: 0-d, for example the number of tokens that count in the step.
        chunk_bytes: of the logits that exist at one time.
    """
    loss: torch.Tensor = _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, labels_N, divisor.to(torch.float32), ignore_index, chunk_bytes
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_N: torch.Tensor,
        divisor: torch.Tensor,
        ignore_index: int,
        chunk_bytes: int,
    ) -> torch.Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = None
        losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        tokens = max(1, chunk_bytes // (len(weight_VD) * hidden_ND.element_size()))
        for start in range(0, len(hidden_ND), tokens):
            part = slice(start, start + tokens)
            logits = F.linear(hidden_ND[part], weight_VD)
            _softmax(logits, labels_N[part], losses_N[part], divisor, ignore_index)
            if grad_hidden is not None:
                torch.mm(logits, weight_VD, out=grad_hidden[part])
            if needs_weight:
                only = tokens >= len(hidden_ND)
                grad_weight = logits.t() @ hidden_ND if only else _accumulated(grad_weight, logits, hidden_ND[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return losses_N.sum() / divisor

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Not in place: a backward pass that retains its graph may come again.
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if saved is None else _scaled(saved, grad, dtype) for saved, dtype in pairs]
        return (*scaled, None, None, None, None)


def _scaled(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if values.is_cuda and is_installed("triton"):
        from automodel.kernels.triton_loss import scaled

        return scaled(values, factor, dtype)
    return (values * factor).to(dtype)


def _accumulated(total: torch.Tensor | None, logits_CV: torch.Tensor, hidden_CD: torch.Tensor) -> torch.Tensor:
    """total + logits.T @ hidden in FP32."""
    if logits_CV.is_cuda and logits_CV.dtype != torch.float32:
        if total is None:
            return torch.mm(logits_CV.t(), hidden_CD, out_dtype=torch.float32)
        return torch.addmm(total, logits_CV.t(), hidden_CD, out_dtype=torch.float32, out=total)
    product = (logits_CV.t() @ hidden_CD).float()
    return product if total is None else total.add_(product)


def _softmax(
    logits_CV: torch.Tensor, labels_C: torch.Tensor, losses_C: torch.Tensor, divisor: torch.Tensor, ignore_index: int
) -> None:
    """Write the loss of each row, and over the logits the gradient of the sum of losses over `divisor`."""
    if logits_CV.is_cuda:
        from automodel.kernels.triton_loss import softmax_gradient

        softmax_gradient(logits_CV, labels_C, losses_C, divisor, ignore_index)
        return
    counts_C = labels_C != ignore_index
    chosen_C1 = labels_C.clamp(min=0).unsqueeze(1)
    wide_CV = logits_CV.float()
    normalizer_C = torch.logsumexp(wide_CV, -1)
    losses_C.copy_(torch.where(counts_C, normalizer_C - wide_CV.gather(1, chosen_C1).squeeze(1), 0.0))
    gradient_CV = torch.exp(wide_CV - normalizer_C.unsqueeze(1))
    gradient_CV.scatter_add_(1, chosen_C1, torch.full_like(chosen_C1, -1, dtype=torch.float32))
    logits_CV.copy_(gradient_CV * (counts_C / divisor).unsqueeze(1))
