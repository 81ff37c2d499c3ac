"""The run's own healthy past: medians and deviations that records are compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...protocol.paper import CREDIT_GAIN_FLOOR
from ...protocol.paper import SCALE_GROWTH as SCALE_GROWTH_RULE
from ..records import StepRecord
from .events import BASELINE, CREDIT_GAIN, GROWTH, HIDDEN_NORM
from .policy import RECENT, AlarmPolicy
from .rules import Finding
from .series import (
    MAD_TO_SIGMA,
    Array,
    exp,
    log_of_features,
    median_of,
    place,
    series_layout,
    within,
)

# They are taken anew after so many; how far they can have moved is known without their medians.
_RECENT_REFRESH = 3
# The baseline is computed anew once so many healthy records have come: a tenth of it is stale.
_REFRESH = 30


class Baseline:
    """What the figures of one set of states have been while all was well.

    Args:
        policy: of the alarms.
        states: n.
    """

    def __init__(self, policy: AlarmPolicy, states: int) -> None:
        self._policy = policy
        self._layout = series_layout(states)
        # The healthy figures of the last records, a row each, the oldest overwritten first.
        self._history: Array = np.empty((policy.window, 0))
        self._learned = 0
        self._since_refresh = 0
        self._median: Array | None = None
        self._mad: Array | None = None
        # Figures of records that were plainly healthy, not yet in the history.
        self._waiting: list[tuple[float, ...]] = []
        self._bounds: tuple[list[float], list[float]] | None = None
        # Narrower ones, which no healthy record that they hold can move.
        self._lasting: tuple[list[float], list[float]] | None = None

    @property
    def has_bounds(self) -> bool:
        """Whether it is known between which figures all is well."""
        return self._bounds is not None

    def holds(self, values: Sequence[float]) -> bool:
        """Return whether nothing deviates and no threshold is passed; the figures then wait.

        By plain comparisons, which do for nearly every record of a run.
        """
        if self._lasting is not None:
            if within(self._lasting, values):
                return True
            # The bounds move with whole groups of those that wait.
            self._lasting = None
            self.learn_waiting(len(self._waiting) // _RECENT_REFRESH * _RECENT_REFRESH)
        return self._bounds is not None and within(self._bounds, values)

    def wait(self, values: tuple[float, ...]) -> None:
        """Take the figures of a record that is plainly healthy; they are learned in groups."""
        self._waiting.append(values)
        count = len(self._waiting)
        due = self._lasting is None or self._since_refresh + count >= _REFRESH
        if due and count % _RECENT_REFRESH == 0:
            self.learn_waiting(count)
            # Not beside a refresh: both at once take as long as a small step in a CUDA graph.
            if self._since_refresh:
                self._bound_lasting()

    def learn_all(self) -> None:
        """Learn all figures that wait."""
        self.learn_waiting(len(self._waiting))

    def _bound(self) -> None:
        """Note between which figures nothing deviates and no limit is passed."""
        self._bounds = None
        if self._median is not None and self._policy.floor == "credit_gain":
            jump, far = self._steps()
            self._bounds = self._between(
                np.maximum(self._recent - jump, self._median - far),
                np.minimum(self._recent + jump, self._median + far),
            )  # with another floor another figure has the limit

    def _bound_lasting(self) -> None:
        """Note between which figures all is well for as long as all stays between them.

        The median of the last records lies in an interval of half the jump to either side of it.
        It stays there while others come from there: more than half would have to come from beyond.
        So no two of them, nor a record and that median, are a jump apart. The baseline is another
        matter: it stays as it is until a refresh.
        """
        rows = self._latest()
        if self._bounds is None or self._median is None or np.isnan(rows).any():
            return
        jump, far = self._steps()
        latest = median_of(rows)
        low = np.maximum(latest, self._recent) - jump / 2
        high = np.minimum(latest, self._recent) + jump / 2
        # What judges now is a little older than the latest: it must lie there too.
        if (low <= self._recent).all() and (self._recent <= high).all():
            low, high = np.maximum(low, self._median - far), np.minimum(high, self._median + far)
            self._lasting = self._between(low, high)

    def _between(self, low: Array, high: Array) -> tuple[list[float], list[float]]:
        """Return the figures of bounds of logarithms, no farther than the published limits."""
        thresholds = self._policy.thresholds
        low, high = np.exp(low), np.exp(high)
        growth = self._layout[GROWTH]
        limit = SCALE_GROWTH_RULE.threshold_in(thresholds)
        high[growth] = np.minimum(high[growth], limit)
        low[-1] = max(low[-1], CREDIT_GAIN_FLOOR.threshold_in(thresholds))
        return low.tolist(), high.tolist()

    def _steps(self) -> tuple[Array, Array]:
        """Return by what a logarithm has jumped, and what is far, for each figure."""
        policy, gains = self._policy, self._layout[CREDIT_GAIN]
        jump = np.full(self._layout.width, math.log(policy.jump))
        jump[gains] = math.log(policy.gain_jump)
        # A gain may wander over decades while a task gets solved: only its jumps count.
        far = np.full(self._layout.width, math.log(policy.far))
        far[gains] = math.inf
        return jump, far

    def deviations(self, record: StepRecord, values: Array, level: float) -> list[Finding]:
        """Return the figures that deviate from the baseline, by ``level`` times the limits."""
        if self._median is None or self._mad is None:
            return []
        policy = self._policy
        sigma = MAD_TO_SIGMA * self._mad
        away = values - self._median
        moved = values - self._recent
        jump, far = self._steps()
        with np.errstate(invalid="ignore"):
            # A jump must lead away from the baseline, not back to it.
            jumped = (np.abs(moved) > level * jump) & (np.sign(moved) == np.sign(away))
            beyond = np.abs(away) > level * policy.deviations * sigma
            hits = beyond & (jumped | (np.abs(away) > level * far))
        found = []
        for index in np.flatnonzero(hits):
            figure, l = place(int(index), len(record.layers))
            limit = max(policy.deviations * sigma[index], jump[index])
            # Compared per feature, told as the norm of all features that there are now.
            features = log_of_features(record, l) if figure == HIDDEN_NORM else 0.0
            middle = self._median[index] + features
            found.append(
                Finding(
                    BASELINE,
                    figure,
                    record.layers[l],
                    exp(values[index] + features),
                    exp(middle + math.copysign(limit, away[index])),
                    exp(middle),
                    float(self._mad[index]),
                )
            )
        return found

    def learn_waiting(self, count: int) -> None:
        """Learn the first so many of the records that wait."""
        if not count:
            return
        # All of them are positive numbers.
        figures = np.log(self._waiting[:count])
        del self._waiting[:count]
        # Of most nothing follows but that they are there: all before the last one that comes with
        # a refresh.
        quiet = max(0, count - 1 - (self._since_refresh + count) % _RECENT_REFRESH)
        if self._since_refresh + quiet >= _REFRESH or self._history.shape[1] != figures.shape[1]:
            quiet = 0
        if quiet:
            places = np.arange(self._learned, self._learned + quiet) % len(self._history)
            self._history[places] = figures[:quiet]
            self._learned += quiet
            self._since_refresh += quiet
            self._lasting = None
        for at, values in enumerate(figures[quiet:], quiet + 1):
            self.learn(values, count - at)

    def learn(self, values: Array, more: int = 0) -> None:
        """Put healthy figures into the baseline; ``more`` follow at once."""
        self._lasting = None
        if self._history.shape[1] != len(values):
            self._history = np.empty((self._policy.window, len(values)))
        self._history[self._learned % len(self._history)] = values
        self._learned += 1
        self._since_refresh += 1
        if self._learned < self._policy.min_window:
            return
        # Of several refreshes at once only the last one is seen.
        due = self._since_refresh % _RECENT_REFRESH == 0 and more < _RECENT_REFRESH
        if self._median is None or due:
            self._recent: Array = median_of(self._latest())
            self._bounds = None
        if self._median is None or self._since_refresh >= _REFRESH:
            past = self._history[: self._learned]
            self._median = median_of(past)
            self._mad = np.maximum(median_of(np.abs(past - self._median)), self._policy.min_mad)
            self._since_refresh = 0
            self._bounds = None
        if self._bounds is None and more < _RECENT_REFRESH:
            self._bound()

    def _latest(self) -> Array:
        """Return the figures of the last healthy records, a row each."""
        places = np.arange(self._learned - RECENT, self._learned) % len(self._history)
        return self._history[places]
