"""The language-model head: logits, or the loss in one operation without them."""

from __future__ import annotations

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from automodel.kernels.cross_entropy import linear_cross_entropy

_LOSS_ARGUMENTS = {"num_items_in_batch", "shift_labels", "ignore_index"}


class LanguageModelHead(nn.Linear):
    """A linear layer without bias onto the vocabulary.

    Calling it with labels keeps the loss inside `forward`, where FSDP has the weight gathered.
    """

    def __init__(self, hidden_size: int, vocabulary: int) -> None:
        super().__init__(hidden_size, vocabulary, bias=False)

    def forward(
        self,
        x_BSD: torch.Tensor,
        labels_BS: torch.Tensor | None = None,
        divisor: torch.Tensor | None = None,
        ignore_index: int = -100,
    ) -> torch.Tensor:
        """Logits [B, S, V]; or, with labels (already shifted), the sum of the tokens' losses over `divisor`."""
        if labels_BS is None or divisor is None:
            return super().forward(x_BSD)
        return linear_cross_entropy(
            x_BSD.flatten(0, 1), self.weight, labels_BS.flatten(), divisor, ignore_index=ignore_index
        )


def can_skip_logits(loss_function: object, arguments: dict[str, object]) -> bool:
    """Whether the loss is transformers' own for causal language models, with arguments that the head knows."""
    return loss_function is ForCausalLMLoss and arguments.keys() <= _LOSS_ARGUMENTS


def loss_without_logits(
    head: LanguageModelHead,
    x_BSD: torch.Tensor,
    labels_BS: torch.Tensor | None,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """What transformers' `ForCausalLMLoss` computes from logits: the mean over the tokens that count.

    Args:
        labels_BS: shifted here, unless `shift_labels` are given.
        num_items_in_batch: divide by it instead of by the number of tokens that count.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels_BS, (0, 1), value=ignore_index)[:, 1:]
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    divisor = torch.as_tensor(num_items_in_batch, device=x_BSD.device)
    return head(x_BSD, shift_labels.to(x_BSD.device), divisor, ignore_index)
