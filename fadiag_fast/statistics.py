"""Reduce one captured batch to the numbers that the protocol reads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .capture import Captured


@dataclass(frozen=True)
class BatchStatistics:
    """What one batch of B samples says of the n = L + 1 hidden states.

    Attributes:
        hidden_norm: ‖h_l‖ per sample, ``[n, B]`` float64.
        grad_norm: ‖g_l‖ per sample, ``[n, B]`` float64; carries 1/B under a mean-reduced loss.
        output_grad_norm: ‖∂loss/∂logits‖ per sample, ``[B]`` float64, with the same factor.
        credit_gain: ``grad_norm / output_grad_norm``, ``[n, B]``: free of the loss's reduction and
            of the size of the output error. NaN for a sample whose output error is zero.
        grad_mean: per state the batch mean of the raw gradients, shaped like a sample.
        loss: the batch's loss.
        correct: samples whose largest logit is the label's; None where labels are no classes.
    """

    hidden_norm: Tensor
    grad_norm: Tensor
    output_grad_norm: Tensor
    credit_gain: Tensor
    grad_mean: tuple[Tensor, ...]
    loss: float
    correct: int | None

    @property
    def batch_size(self) -> int:
        return self.hidden_norm.shape[1]


def batch_statistics(
    captured: Captured, labels: Tensor, *, backend: ops.Backend | None = None
) -> BatchStatistics:
    """Compute :class:`BatchStatistics`, all layers and the logits in one call of the operator."""
    # The logits go along as one more layer: their gradient's norm is the output error.
    statistics = ops.layer_statistics(
        [*captured.hiddens, captured.logits],
        [*captured.grads, captured.logit_grads],
        backend=backend,
    )
    output_grad_norm = statistics.grad_norm[-1]
    correct = None
    if labels.dim() == 1 and not labels.is_floating_point() and captured.logits.dim() == 2:
        correct = int((captured.logits.argmax(1) == labels).sum())
    return BatchStatistics(
        hidden_norm=statistics.hidden_norm[:-1],
        grad_norm=statistics.grad_norm[:-1],
        output_grad_norm=output_grad_norm,
        credit_gain=statistics.grad_norm[:-1] / output_grad_norm,
        grad_mean=tuple(statistics.grad_mean)[:-1],
        loss=float(captured.loss),
        correct=correct,
    )


def medians(values: Tensor) -> list[float]:
    """Return the median of each row of ``[n, B]``, the lower one of an even number.

    A NaN stays in its own sample: the median is over the others, and NaN only where there are none.
    """
    if values.shape[-1] == 0:
        return [float("nan")] * values.shape[0]
    rows: list[float] = torch.nanmedian(values, dim=-1).values.tolist()
    return rows
