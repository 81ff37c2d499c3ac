"""Move each threshold over the rows of a scan: where verdicts change, and how wide the gap is.

A threshold is well placed if the values on its two sides lie far apart: then the verdicts do not
hang on its exact place. In the protocol's own study healthy networks grow by at most 11.0 and
degenerate ones by at least 694; every threshold of (a) between the two says the same.

Each diagnostic compares one value per checkpoint with its threshold, so that a checkpoint changes
sides once, at that value. Sorting the values therefore gives the outcome for every threshold there
is; nothing is sampled. The other thresholds stay where they are meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from .._common.jsonio import strict
from .._common.tables import number, text_table
from ..protocol import (
    NOT_ENOUGH_DATA,
    TRUSTWORTHY,
    Criterion,
    DiagnosticProtocol,
    DiagnosticRule,
    DiagnosticThresholds,
    Figures,
    Status,
)
from ..protocol.paper import PAPER
from ..protocol.rules import verdict_from
from .results import ScanResult

_Array = np.ndarray[Any, np.dtype[Any]]

# Verdicts as numbers; from the last one on, one for each set of diagnostics that fired.
_TRUSTWORTHY, _NOT_ENOUGH_DATA, _WALK_BACK = 0, 1, 2


@dataclass(frozen=True)
class Interval:
    """A range of one threshold in which every choice gives the same outcome.

    Attributes:
        low, high: its ends; None where it is open. Of an end itself the diagnostic's comparison
            decides: one that fires above its threshold does not fire at it.
        fires: checkpoints that fire.
        changes: checkpoints whose verdict is another than at the present threshold.
        trustworthy, walk_back, not_enough_data: checkpoints by verdict.
    """

    low: float | None
    high: float | None
    fires: int
    changes: int
    trustworthy: int
    walk_back: int
    not_enough_data: int


@dataclass(frozen=True)
class Gap:
    """Two neighbouring values with nothing between them.

    Attributes:
        low, high: the values.
        width: high / low where ``ratio``, else high - low.
        ratio: whether it is one: for figures that spread over powers of ten.
    """

    low: float
    high: float
    width: float
    ratio: bool

    def __str__(self) -> str:
        width = f"a factor of {number(self.width)}" if self.ratio else number(self.width)
        return f"{number(self.low, 4)} to {number(self.high, 4)} ({width})"


@dataclass(frozen=True)
class ThresholdSweep:
    """One threshold over all checkpoints.

    Attributes:
        field: its name in :class:`~fadiag_fast.protocol.DiagnosticThresholds`.
        title: what it decides.
        comparison: ``>`` or ``<``: a checkpoint fires where ``value comparison threshold``.
        current: where the threshold stands.
        evaluated: checkpoints that have a value.
        fires: those that fire at the present threshold.
        always: those that fire at every threshold: non-finite states or gradients.
        gap: the values next to the present threshold, one on each side; None where a side is empty.
        widest: the widest gap between any two neighbouring values; None with fewer than two.
        intervals: every outcome there is, in ascending order of the threshold.
    """

    field: str
    title: str
    comparison: str
    current: float
    evaluated: int
    fires: int
    always: int
    gap: Gap | None
    widest: Gap | None
    intervals: tuple[Interval, ...]

    def at(self, threshold: float) -> Interval:
        """Return the outcome for one threshold."""
        for interval in self.intervals:
            high = interval.high
            if high is None or threshold < high or (self.comparison == "<" and threshold == high):
                return interval
        raise AssertionError("the last interval is open")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; non-finite ones by name."""
        record: dict[str, Any] = strict(asdict(self))
        return record

    def __str__(self) -> str:
        word = "above" if self.comparison == ">" else "below"
        lines = [
            f"{self.title}: fires {word} {number(self.current)}; "
            f"{self.fires:,} of {self.evaluated:,} checkpoints do"
            + (f", {self.always:,} of them at any threshold (not finite)" if self.always else "")
        ]
        if self.evaluated == 0:
            return lines[0]
        if self.gap is not None:
            lines.append(f"  gap around the threshold: {self.gap}")
        else:
            lines.append("  no gap around the threshold: all values are on one side of it")
        if self.widest is not None and self.widest != self.gap:
            lines.append(f"  widest gap of all:        {self.widest}")
        header = [
            "threshold",
            "fire",
            "verdicts changed",
            "trustworthy",
            "walk-back",
            "short of data",
        ]
        rows = []
        for threshold in _what_ifs(self):
            found = self.at(threshold)
            rows.append(
                [
                    number(threshold) + (" (now)" if threshold == self.current else ""),
                    *(
                        f"{count:,}"
                        for count in (
                            found.fires,
                            found.changes,
                            found.trustworthy,
                            found.walk_back,
                            found.not_enough_data,
                        )
                    ),
                ]
            )
        lines += [f"  {line}" for line in text_table(header, rows)]
        return "\n".join(lines)


def _what_ifs(sweep: ThresholdSweep) -> list[float]:
    """Return thresholds to show: around the present one, as the figure spreads."""
    if sweep.field in ("scale_growth", "gradient_floor", "credit_gain_floor"):
        around = [sweep.current * f for f in (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100)]
    elif sweep.field == "min_batches":
        around = [sweep.current + d for d in (-4, -2, -1, 0, 1, 2, 4)]
        around = [t for t in around if t >= 2]
    else:
        steps = (0.05, 0.1, 0.2) if sweep.field == "direction_stability" else (0.5, 1.0, 2.0)
        around = [*(sweep.current - s for s in reversed(steps)), sweep.current]
        around = [round(t, 9) for t in [*around, *(sweep.current + s for s in steps)]]
    return around


def sweep_thresholds(
    result: ScanResult, thresholds: DiagnosticThresholds | None = None, *, last: bool = False
) -> list[ThresholdSweep]:
    """Sweep each threshold of :class:`~fadiag_fast.protocol.DiagnosticThresholds` over a scan.

    Args:
        result: the rows.
        thresholds: where they stand; None for those that the scan was judged by.
        last: take only the last audited checkpoint of each run: (c) fires on healthy networks early
            in training.

    Returns:
        Of the paper protocol's diagnostics, whichever protocol judged the rows: (a) to (d), then
        the batches that (c) asks for, then the credit gain's floor. The latter is in no verdict:
        the report says with it that the gradient is lost on its way.
    """
    thresholds = thresholds or result.thresholds
    outcomes = _Outcomes(PAPER, result.paper_figures(last=last), thresholds)
    rules = list(enumerate(PAPER.rules))
    return [
        *(outcomes.sweep_rule(index, rule) for index, rule in rules),
        *(
            outcomes.sweep_requirement(index, rule, rule.requirement)
            for index, rule in rules
            if rule.requirement is not None
        ),
        *(outcomes.sweep_remark(criterion) for criterion in PAPER.remarks),
    ]


class _Outcomes:
    """What a protocol says of n checkpoints, and what it would say if one diagnostic changed sides.

    Args:
        protocol: the protocol, of k rules.
        figures: of the checkpoints.
        thresholds: where the thresholds stand.
    """

    def __init__(
        self,
        protocol: DiagnosticProtocol,
        figures: Sequence[Figures],
        thresholds: DiagnosticThresholds,
    ) -> None:
        self._figures, self._thresholds = figures, thresholds
        now = [protocol.evaluate(one, thresholds) for one in figures]
        shape = len(figures), len(protocol.rules)
        self._fired = _flags([[d.fired for d in one] for one in now], shape)
        lacking = Status.NOT_ENOUGH_DATA
        self._lacks = _flags([[d.status is lacking for d in one] for one in now], shape)
        # Verdicts as numbers: `_verdicts` has that of every combination of bits, one for each rule
        # that fires and the last one for data that do not suffice.
        self._decisive = np.array([rule.decisive for rule in protocol.rules])
        keys = [(1 << bit, rule.key) for bit, rule in enumerate(protocol.rules) if rule.decisive]
        texts = [
            verdict_from([key for bit, key in keys if code & bit], bool(lacks))
            for lacks in (0, 1)
            for code in range(1 << len(protocol.rules))
        ]
        kinds = {TRUSTWORTHY: _TRUSTWORTHY, NOT_ENOUGH_DATA: _NOT_ENOUGH_DATA}
        others = {text: _WALK_BACK + at for at, text in enumerate(dict.fromkeys(texts))}
        self._verdicts = np.array([kinds.get(text, others[text]) for text in texts])
        self._now = self._verdicts_of(self._fired, self._lacks)
        # The values at which each checkpoint changes sides, per rule; NaN where there is none.
        self._critical = [
            _numbers([rule.critical_value(one, thresholds) for one in figures])
            for rule in protocol.rules
        ]

    def _verdicts_of(self, fired: _Array, lacks: _Array) -> _Array:
        """Return the verdict of each checkpoint, ``[n]``, from flags ``[n, k]``."""
        bits = 1 << np.arange(fired.shape[1] + 1)
        flags = np.column_stack([fired, lacks[:, self._decisive].any(axis=1)])
        return np.asarray(self._verdicts[flags @ bits])

    def _verdicts_if(self, index: int, *, fires: bool | _Array, lacks: bool = False) -> _Array:
        """Return the verdicts if one rule had another outcome, ``[n]``."""
        fired, lacking = self._fired.copy(), self._lacks.copy()
        fired[:, index], lacking[:, index] = fires, lacks
        return self._verdicts_of(fired, lacking)

    def sweep_rule(self, index: int, rule: DiagnosticRule) -> ThresholdSweep:
        """Move the threshold of a rule."""
        critical = self._critical[index]
        enough = [rule.has_data(one, self._thresholds) for one in self._figures]
        return self._sweep(
            rule,
            f"({rule.key}) {rule.name}",
            critical,
            ~np.isnan(critical) & np.array(enough, dtype=bool),
            self._verdicts_if(index, fires=True),
            self._verdicts_if(index, fires=False),
        )

    def sweep_requirement(
        self, index: int, rule: DiagnosticRule, requirement: Criterion
    ) -> ThresholdSweep:
        """Move the threshold of the data that a rule asks for."""
        critical = self._critical[index]
        if_enough = np.array([rule.is_beyond(value, self._thresholds) for value in critical])
        values = self._values(requirement)
        return self._sweep(
            requirement,
            f"{requirement.name} that ({rule.key}) asks for",
            values,
            ~np.isnan(values),
            self._verdicts_if(index, fires=False, lacks=True),
            self._verdicts_if(index, fires=if_enough),
        )

    def sweep_remark(self, criterion: Criterion) -> ThresholdSweep:
        """Move a threshold that no verdict depends on."""
        values = self._values(criterion)
        title = f"{criterion.name} (in no verdict)"
        return self._sweep(criterion, title, values, ~np.isnan(values), self._now, self._now)

    def _values(self, criterion: Criterion) -> _Array:
        """Return the statistic of each checkpoint, ``[n]``; NaN where it was not measured."""
        found = [criterion.statistics(one) for one in self._figures]
        return _numbers([one[0][0] if one else None for one in found])

    def _sweep(
        self,
        criterion: Criterion,
        title: str,
        critical: _Array,
        evaluated: _Array,
        if_beyond: _Array,
        if_not: _Array,
    ) -> ThresholdSweep:
        """Count outcomes over all values of a threshold.

        Args:
            criterion: whose threshold it is.
            title: what it decides.
            critical: value at which each checkpoint changes sides, ``[n]``.
            evaluated: which have one, ``[n]``.
            if_beyond, if_not: the verdicts on either side, ``[n]``.
        """
        now, current = self._now, criterion.threshold_in(self._thresholds)
        order = np.flatnonzero(evaluated)
        order = order[np.argsort(critical[order], kind="stable")]
        values = critical[order]
        distinct, starts = np.unique(values, return_index=True)
        finite = distinct[np.isfinite(distinct)]
        # Between two values the checkpoints below are on one side and those above on the other.
        cuts = [
            *(int(start) for start in starts[np.isfinite(distinct)]),
            int((values < np.inf).sum()),
        ]
        above = criterion.comparison == ">"
        rest = ~evaluated

        def cumulative(flags: _Array) -> _Array:
            return np.concatenate([[0], np.cumsum(flags[order])])

        def total(beyond: _Array, within: _Array, fixed: _Array) -> list[int]:
            firing, passing = cumulative(beyond), cumulative(within)
            constant = int(fixed[rest].sum())
            low, high = (passing, firing) if above else (firing, passing)
            return [int(low[cut] + high[-1] - high[cut]) + constant for cut in cuts]

        everyone, nobody = np.ones(len(now), dtype=bool), np.zeros(len(now), dtype=bool)
        counts = [
            total(everyone, nobody, nobody),
            total(if_beyond != now, if_not != now, nobody),
            total(if_beyond == _TRUSTWORTHY, if_not == _TRUSTWORTHY, now == _TRUSTWORTHY),
            total(if_beyond >= _WALK_BACK, if_not >= _WALK_BACK, now >= _WALK_BACK),
            total(
                if_beyond == _NOT_ENOUGH_DATA, if_not == _NOT_ENOUGH_DATA, now == _NOT_ENOUGH_DATA
            ),
        ]
        ends = [None, *(float(v) for v in finite), None]
        intervals = tuple(
            Interval(ends[i], ends[i + 1], *(count[i] for count in counts))
            for i in range(len(finite) + 1)
        )
        ratio = criterion.logarithmic
        lower = finite[finite <= current] if above else finite[finite < current]
        upper = finite[len(lower) :]
        around = [_gap(lower[-1], upper[0], ratio)] if len(lower) and len(upper) else []
        neighbours = [_gap(low, high, ratio) for low, high in pairwise(finite)]
        sweep = ThresholdSweep(
            field=criterion.threshold,
            title=title,
            comparison=criterion.comparison,
            current=float(current),
            evaluated=len(order),
            fires=0,
            always=int(np.isposinf(values).sum() if above else np.isneginf(values).sum()),
            gap=around[0] if around else None,
            widest=max(neighbours, key=lambda gap: gap.width, default=None),
            intervals=intervals,
        )
        return replace(sweep, fires=sweep.at(current).fires)


def _numbers(values: Sequence[float | None]) -> _Array:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _flags(rows: Sequence[Sequence[bool]], shape: tuple[int, int]) -> _Array:
    return np.array(rows, dtype=bool).reshape(shape)


def _gap(low: float, high: float, ratio: bool) -> Gap:
    low, high = float(low), float(high)
    if ratio:
        return Gap(low, high, high / low if low > 0 else math.inf, True)
    return Gap(low, high, high - low, False)


__all__ = ["Gap", "Interval", "ThresholdSweep", "sweep_thresholds"]
