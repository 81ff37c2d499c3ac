"""Gradient directions across batches: their cosines, an interval, and the null."""

from typing import NamedTuple

import torch
from torch import Tensor

# Sign flips of so many directions are enumerated, 2¹¹ of them; of more, counted by their variance.
_MOST_ENUMERATED = 12


# 95% of a normal distribution lie below so many standard deviations.
_NORMAL_95 = 1.6448536269514722


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
