"""Statistics of a run's own past: medians and deviations of logarithms."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from operator import le

import numpy as np
import numpy.typing as npt

from ..._common.row_layout import RowLayout
from ..records import StepRecord
from .events import CREDIT_GAIN, GROWTH, HIDDEN_NORM

Array = npt.NDArray[np.float64]


# 1.4826 MADs of a normal distribution are its standard deviation.
MAD_TO_SIGMA = 1.4826


# A logarithm of zero; below that of the smallest subnormal double.
_LOG_ZERO = -750.0


def within(bounds: tuple[list[float], list[float]], values: Sequence[float]) -> bool:
    low, high = bounds  # a NaN is in no order with them
    return all(map(le, low, values)) and all(map(le, values, high))


def norms_per_feature(record: StepRecord) -> tuple[float, ...]:
    """Return the root mean squares of the states, their norms where a size is not known."""
    hidden, rms = record.hidden_norms, record.rms_norms
    known = len(rms) == len(hidden) and all(
        r == r or h != h for r, h in zip(rms, hidden, strict=True)
    )
    return rms if known else hidden


def log_of_features(record: StepRecord, l: int) -> float:
    """Return ln of what turns the figure of :func:`norms_per_feature` into the norm of state l."""
    norm, figure = record.hidden_norms[l], norms_per_feature(record)[l]
    return math.log(norm / figure) if 0 < norm < math.inf and 0 < figure < math.inf else 0.0


def figures_of(record: StepRecord) -> Array:
    """Return ln of n hidden norms per feature, n − 1 growths and n gains.

    NaN where nothing can be judged; a growth of 1 between chains.
    """
    hidden = _logs(record.hidden_norms)
    per_feature = _logs(norms_per_feature(record))
    gains = _logs(record.credit_gains)
    for l, name in enumerate(record.layers):
        if name in record.unreached:
            hidden[l] = per_feature[l] = gains[l] = math.nan
    with np.errstate(invalid="ignore"):
        growth = np.diff(hidden)
    for start in record.chain_starts:
        growth[start - 1] = 0.0
    return np.concatenate([per_feature, growth, gains])


def _logs(values: Sequence[float]) -> Array:
    found = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(found)
    # Infinite figures are the business of another rule; as NaN they spoil no baseline.
    return np.where(found == 0, _LOG_ZERO, np.where(np.isfinite(logs), logs, math.nan))


def median_of(values: Array) -> Array:
    """Return the median per column, NaN only for a column without a number."""
    if not np.isnan(values).any():
        ordered, middle = np.sort(values, axis=0), len(values) // 2
        # np.median takes some ten times as long for so few numbers.
        found = ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        return np.asarray(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmedian(values, axis=0))


@functools.lru_cache
def series_layout(states: int) -> RowLayout:
    """Return the columns of :func:`figures_of` for so many states."""
    return RowLayout({HIDDEN_NORM: states, GROWTH: max(0, states - 1), CREDIT_GAIN: states})


def place(index: int, states: int) -> tuple[str, int]:
    """Return the figure and the state of a column of :func:`figures_of`."""
    figure, at = series_layout(states).place_of(index)
    return figure, at + (figure == GROWTH)  # the first one grows into the second state


def exp(value: float) -> float:
    return 0.0 if value <= _LOG_ZERO else math.exp(value) if value < 700 else math.inf
