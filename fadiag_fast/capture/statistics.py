"""Reduce one captured batch to the numbers that the protocol reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.reference import LayerStatistics
from .captured import Captured
from .reduction import SampleReduction


class Reduced(NamedTuple):
    """What one batch of B samples says of the n hidden states, on the device of the states.

    With the reduction ``token`` every sample counts T times: N = B·T, and a sample's positions
    follow each other; else N = B.

    Attributes:
        hidden_norm: ‖h_l‖ per sample, ``[n, N]`` float64.
        grad_norm: ‖g_l‖ per sample, ``[n, N]`` float64; carries 1/B under a mean-reduced loss.
        output_grad_norm: ‖∂loss/∂logits‖ per sample, ``[N]`` float64, with the same factor.
        credit_gain: ``grad_norm / output_grad_norm``, ``[n, N]``: free of the loss's reduction and
            of the size of the output error. NaN for a sample whose output error is zero.
        grad_mean: per state the batch mean of the raw gradients, shaped like a sample.
        logits: the network's output, as it was captured.
        loss: scalar.
    """

    hidden_norm: Tensor
    grad_norm: Tensor
    output_grad_norm: Tensor
    credit_gain: Tensor
    grad_mean: tuple[Tensor, ...]
    logits: Tensor
    loss: Tensor


def reduce_captured(
    captured: Captured,
    reduction: SampleReduction | None = None,
    backend: ops.Backend | None = None,
    has_output: bool = True,
) -> Reduced:
    """Reduce all layers and the logits in one call of the operator.

    Without an output gains are relative to the last state, reduced as all states are.

    Raises:
        ValueError: ``token`` with states of different numbers of positions.
    """
    how = reduction or SampleReduction()
    pairs = [how.apply(h, g) for h, g in zip(captured.hiddens, captured.grads, strict=True)]
    batch_size = len(captured.logits)
    samples = len(pairs[0][0]) if pairs else batch_size
    if any(len(h) != samples for h, _ in pairs):
        raise ValueError(
            f"reduction {how.kind}: expected the same number of positions in every state, got "
            f"shapes {', '.join(str(list(h.shape)) for h in captured.hiddens)}; name taps of one "
            f"shape"
        )
    n = len(pairs)
    error = SampleReduction().apply(captured.logits, captured.logit_grads)
    if not has_output:
        error = pairs[-1]
        batch_size = samples
    together = samples == batch_size
    # The logits go along as one more layer: their gradient's norm is the output error.
    statistics = _statistics([*pairs, error] if together else pairs, backend)
    output_grad_norm = (statistics if together else _statistics([error], backend)).grad_norm[-1]
    if not together:
        output_grad_norm = output_grad_norm.repeat_interleave(samples // batch_size)
    return Reduced(
        hidden_norm=statistics.hidden_norm[:n],
        grad_norm=statistics.grad_norm[:n],
        output_grad_norm=output_grad_norm,
        credit_gain=statistics.grad_norm[:n] / output_grad_norm,
        grad_mean=tuple(statistics.grad_mean)[:n],
        logits=captured.logits,
        loss=captured.loss,
    )


@dataclass(frozen=True)
class BatchStatistics:
    """What the protocol keeps of one batch; the figures are those of :class:`Reduced`.

    Attributes:
        hidden_norm, grad_norm, output_grad_norm, credit_gain, grad_mean: see :class:`Reduced`.
        shapes: of one sample's state as it was captured, ``n``.
        sizes: features that one norm is taken over, ``n``.
        loss: the batch's loss.
        correct: samples whose largest logit is the label's; None where labels are no classes.
        batch_size: samples in the batch.
        measurable: whether each ‖∂loss/∂logits‖ is a normal number of its dtype, ``[N]`` bool: a
            smaller one has lost digits, or all of them.
        class_error: see :func:`class_errors`, ``[B]``; None where labels are no classes.
        equal_logits: whether in every sample all logits are the same number.
        grad_dtype: of the deepest state's gradient.
    """

    hidden_norm: Tensor
    grad_norm: Tensor
    output_grad_norm: Tensor
    credit_gain: Tensor
    grad_mean: tuple[Tensor, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    loss: float
    correct: int | None
    batch_size: int
    measurable: Tensor
    class_error: Tensor | None
    equal_logits: bool
    grad_dtype: torch.dtype


def class_errors(logits: Tensor, labels: object) -> Tensor | None:
    """Return ‖softmax − onehot‖ per sample, ``[..., B]`` float64, from 0 to √2.

    The output error as cross-entropy defines it, computed in float64 from the logits: unlike
    ‖∂loss/∂logits‖ it has no loss scale, no 1/B and no dtype of its own.

    Args:
        logits: ``[..., B, C]``.
        labels: ``[B]`` classes; a sample with another label (−100 is left out by losses) has NaN.

    Returns None where labels are no classes.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        return None
    if logits.dim() < 2 or logits.shape[-2] != len(labels) or logits.is_complex():
        return None
    classes = logits.shape[-1]
    known = (labels >= 0) & (labels < classes)
    # Nothing here waits for a GPU, or looks at a label there.
    onehot = labels[:, None] == torch.arange(classes, device=labels.device)
    errors = torch.linalg.vector_norm(
        logits.detach().double().softmax(-1) - onehot.double(), dim=-1
    )
    return torch.where(known, errors, torch.nan)


def equal_logits(logits: Tensor) -> Tensor:
    """Return whether in every sample of ``[S, B, ..., C]`` all logits are one number, ``[S]``."""
    flat = torch.view_as_real(logits).flatten(-2) if logits.is_complex() else logits
    if logits.dim() < 3:  # one number per sample has no others to be equal to
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    return (flat == flat[..., :1]).flatten(1).all(1) & (flat.shape[-1] > 1)


def measurable_errors(output_grad_norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which ‖∂loss/∂logits‖ are normal numbers of the dtype they were computed in."""
    return output_grad_norm >= torch.finfo(dtype).smallest_normal


def batch_statistics(
    captured: Captured,
    labels: object,
    *,
    reduction: SampleReduction | None = None,
    backend: ops.Backend | None = None,
    has_output: bool = True,
) -> BatchStatistics:
    """Compute :class:`BatchStatistics`; raises what :func:`reduce_captured` raises.

    ``has_output`` says whether the captured logits are logits: see :class:`Captured`.
    """
    reduced = reduce_captured(captured, reduction, backend, has_output)
    correct = None
    if (
        has_output
        and isinstance(labels, Tensor)
        and labels.dim() == 1
        and not labels.is_floating_point()
        and captured.logits.dim() == 2
    ):
        correct = int((captured.logits.argmax(1) == labels).sum())
    return BatchStatistics(
        hidden_norm=reduced.hidden_norm,
        grad_norm=reduced.grad_norm,
        output_grad_norm=reduced.output_grad_norm,
        credit_gain=reduced.credit_gain,
        grad_mean=reduced.grad_mean,
        shapes=tuple(tuple(h.shape[1:]) for h in captured.hiddens),
        sizes=tuple(mean.numel() for mean in reduced.grad_mean),
        loss=float(reduced.loss),
        correct=correct,
        batch_size=len(captured.logits),
        measurable=measurable_errors(reduced.output_grad_norm, captured.logit_grads.dtype),
        class_error=class_errors(captured.logits, labels)
        if has_output and captured.logits.dim() == 2
        else None,
        equal_logits=has_output and bool(equal_logits(captured.logits[None])),
        grad_dtype=(captured.grads[-1] if captured.grads else captured.logit_grads).dtype,
    )


def _statistics(
    pairs: Sequence[tuple[Tensor, Tensor]], backend: ops.Backend | None
) -> LayerStatistics:
    """Call the operator; layers in float64 beside others bring the others to float64."""
    wide = torch.float64
    if len({h.dtype == wide for h, _ in pairs}) == 2:
        pairs = [(h.to(wide), g.to(wide)) for h, g in pairs]
    return ops.layer_statistics([h for h, _ in pairs], [g for _, g in pairs], backend=backend)


def medians(values: Tensor) -> list[float]:
    """Return the median of each row of ``[n, B]``, the lower one of an even number.

    A NaN stays in its own sample: the median is over the others, and NaN only where there are none.
    """
    if values.shape[-1] == 0:
        return [float("nan")] * values.shape[0]
    rows: list[float] = torch.nanmedian(values, dim=-1).values.tolist()
    return rows
