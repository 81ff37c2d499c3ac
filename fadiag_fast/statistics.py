"""Reduce one captured batch to the numbers that the protocol reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import ops
from .capture import Captured
from .reference import LayerStatistics

Reduction = Literal["flatten", "cls", "mean", "token"]
REDUCTIONS: tuple[Reduction, ...] = ("flatten", "cls", "mean", "token")

# Sign flips of so many directions are enumerated, 2¹¹ of them; of more, counted by their variance.
_MOST_ENUMERATED = 12
# 95% of a normal distribution lie below so many standard deviations.
_NORMAL_95 = 1.6448536269514722


@dataclass(frozen=True)
class SampleReduction:
    """What counts as one sample's state where a state has more than two dimensions.

    A state ``[B, D]`` is left alone. ``[B, T, D]`` holds T positions of D features; with four and
    more dimensions the features are dimension 1 (``[B, D, H, W]``) unless ``feature_dim`` says so.

    Attributes:
        kind: ``flatten`` takes all features of all positions; ``cls`` the first position of
            ``[B, T, D]``; ``mean`` the average over the positions, whose gradient is the SUM over
            the positions: the loss's derivative along a shift of all of them; ``token`` counts
            every position as a sample of its own.
        feature_dim: the dimension that holds features, −1 for channels last.

    Raises:
        ValueError: an unknown kind.
    """

    kind: Reduction = "flatten"
    feature_dim: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {self.kind}")

    def feature_index(self, state: Tensor) -> int:
        """Return the dimension that holds the features of a state ``[B, ...]``."""
        if self.feature_dim is None:
            return state.dim() - 1 if state.dim() == 3 else 1
        fits = -state.dim() < self.feature_dim < state.dim() and self.feature_dim != 0
        if not fits:
            raise ValueError(
                f"reduction {self.kind}: expected a feature_dim beside the samples' dimension 0 of "
                f"states of shape {list(state.shape)}, got {self.feature_dim}"
            )
        return self.feature_dim % state.dim()

    def apply(self, hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return a state and its gradient, ``[B, ...]``, as the samples' ``[N, ...]``.

        Raises:
            ValueError: ``cls`` of a state with four and more dimensions, or a ``feature_dim`` that
                the state does not have.
        """
        return self.of_hidden(hidden), self.of_grad(grad)

    def of_hidden(self, hidden: Tensor) -> Tensor:
        """Return a state alone as :meth:`apply` does."""
        return self._reduced(hidden, averaged=True)

    def of_grad(self, grad: Tensor) -> Tensor:
        """Return a state's gradient alone as :meth:`apply` does."""
        return self._reduced(grad, averaged=False)

    def _reduced(self, state: Tensor, averaged: bool) -> Tensor:
        if state.is_complex():
            return torch.view_as_real(self._positions(state, averaged))
        return self._positions(state, averaged)

    def _positions(self, state: Tensor, averaged: bool) -> Tensor:
        if self.kind == "flatten" or state.dim() < 3:
            return state
        if self.kind == "cls":
            if state.dim() != 3:
                raise ValueError(
                    f"reduction cls: expected states of shape [B, T, D], got {list(state.shape)}"
                )
            return state[:, 0]
        features = self.feature_index(state)
        if self.kind == "mean":
            positions = [d for d in range(1, state.dim()) if d != features]
            # A sum of many small terms leaves the precision and the range of 16 bits.
            wide = torch.float32 if state.dtype in (torch.float16, torch.bfloat16) else None
            merge = state.mean if averaged else state.sum
            merged: Tensor = merge(positions, dtype=wide)
            return merged
        return state.movedim(features, -1).flatten(0, -2)


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
    """Say whether in every sample of ``[S, B, ..., C]`` all logits are one number, ``[S]``."""
    flat = torch.view_as_real(logits).flatten(-2) if logits.is_complex() else logits
    if logits.dim() < 3:  # one number per sample has no others to be equal to
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    return (flat == flat[..., :1]).flatten(1).all(1) & (flat.shape[-1] > 1)


def measurable_errors(output_grad_norm: Tensor, dtype: torch.dtype) -> Tensor:
    """Say which ‖∂loss/∂logits‖ are normal numbers of the dtype they were computed in."""
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


class DirectionFigures(NamedTuple):
    """How the directions of K batches agree, per layer; all ``[n]`` on the cosines' device.

    Attributes:
        stability: mean cosine over all pairs of batches that have a direction, NaN without a pair.
        num_directions: batches that have one, int64.
        error: jackknife standard error of the mean, each batch left out in turn.
        null: 95% quantile of the mean over all sign flips of the directions. If they had no sense
            in common, each would be as likely as its opposite: that is the null hypothesis.

    ``error`` and ``null`` are float64, and NaN with fewer than three directions.
    """

    stability: Tensor
    num_directions: Tensor
    error: Tensor
    null: Tensor


def direction_figures(cosines: Tensor) -> DirectionFigures:
    """Compute :class:`DirectionFigures`, without a wait for the device.

    Args:
        cosines: ``[n, K, K]`` float64 of :func:`fadiag_fast.direction_cosines`. A batch without a
            direction has NaN. All sign flips of up to 12 batches are enumerated; of more, a normal
            distribution with the flips' exact variance gives the quantile.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11, for the
    jackknife of a U-statistic.
    """
    batches = cosines.shape[-1]
    first, second = torch.triu_indices(batches, batches, offset=1, device=cosines.device)
    known = cosines.diagonal(dim1=1, dim2=2) == 1
    count = known.sum(dim=1)
    stability = cosines[:, first, second].nanmean(dim=1)
    pairs = torch.where(known[:, :, None] & known[:, None, :], cosines, 0.0)
    upper = pairs[:, first, second]
    of_batch = pairs.sum(dim=2) - pairs.diagonal(dim1=1, dim2=2)
    total = of_batch.sum(dim=1, keepdim=True)
    n = count[:, None].double()
    # Without batch i its row and its column are missing.
    without = torch.where(known, (total - 2 * of_batch) / ((n - 1) * (n - 2)), 0.0)
    centred = torch.where(known, without - without.sum(dim=1, keepdim=True) / n, 0.0)
    error = ((n - 1) / n * centred.square().sum(dim=1, keepdim=True)).sqrt()
    if batches > _MOST_ENUMERATED:
        null = _NORMAL_95 * 2 * upper.square().sum(dim=1, keepdim=True).sqrt() / (n * (n - 1))
    else:
        flipped = upper @ _flipped_pairs(first, second, batches)
        # A batch without a direction changes nothing: each flip of the others comes up again and
        # again, 2^(K − n) times.
        rank = (0.95 * (2 ** (n - 1) - 1)).ceil() * 2 ** (batches - n)
        index = rank.long().clamp(0, flipped.shape[1] - 1)
        null = 2 * flipped.sort(dim=1).values.gather(1, index) / (n * (n - 1))
    error, null = (torch.where(n >= 3, v, torch.nan).squeeze(1) for v in (error, null))
    return DirectionFigures(stability, count, error, null)


def _flipped_pairs(first: Tensor, second: Tensor, batches: int) -> Tensor:
    """Return the sign of each pair, ``[K(K−1)/2, 2^(K−1)]``, under all flips of K directions.

    To flip all of them changes no pair, so the last one stays.
    """
    flips = torch.arange(2 ** max(0, batches - 1), device=first.device)
    flipped = flips >> torch.arange(batches, device=first.device)[:, None] & 1
    return 1.0 - 2.0 * (flipped[first] ^ flipped[second]).double()
