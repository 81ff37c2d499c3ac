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
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from .._common.jsonio import strict
from .._common.tables import number, text_table
from ..protocol import DiagnosticThresholds
from .records import AUDITED
from .results import ScanResult, in_time
from .store import layers_by_record

_Array = np.ndarray[Any, np.dtype[Any]]

# Verdicts as numbers: a bit for each diagnostic that fired; this if none did and data were short.
_SHORT = 1 << 4
_BITS = {"a": 1, "b": 2, "c": 4, "d": 8}


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
    limits = thresholds or result.thresholds
    rows = [row for row in result.rows if row["status"] == AUDITED]
    if last:
        rows = [
            audited[-1]
            for run in result.runs().values()
            if (audited := [row for row in in_time(run) if row["status"] == AUDITED])
        ]
    where = layers_by_record(result.to_arrow("layers"))
    norms = np.asarray(result.to_arrow("layers")["hidden_norm"].to_numpy(), dtype=np.float64)
    spans = [where.get(row["record"], (0, 0)) for row in rows]
    measured = np.array([count > 0 for _, count in spans], dtype=bool)

    def column(name: str) -> _Array:
        return np.array([math.nan if r[name] is None else r[name] for r in rows], dtype=np.float64)

    growth, floor, stability, gain = (
        column(name) for name in ("growth", "grad_norm", "stability", "credit_gain")
    )
    directions = column("num_directions")
    utility = np.array(
        [
            math.nan
            if row["accuracy"] is None or row["frozen_accuracy"] is None
            else round(100.0 * (row["accuracy"] - row["frozen_accuracy"]), 5)
            for row in rows
        ],
        dtype=np.float64,
    )
    broken = np.array(
        [
            count > 0 and (math.isinf(norms[s]) or bool(np.isnan(norms[s : s + count]).any()))
            for s, count in spans
        ],
        dtype=bool,
    )
    enough = measured & (directions >= limits.min_batches)

    # The value at which a checkpoint changes sides; infinite where it fires, or never does, anyhow.
    critical = {
        "a": np.where(broken, np.inf, growth),
        "b": np.where(np.isfinite(floor), floor, -np.inf),
        "c": np.where(np.isnan(stability), -np.inf, stability),
        "d": utility,
    }
    evaluated = {"a": measured, "b": measured, "c": enough, "d": ~np.isnan(utility)}
    fires = {
        "a": measured & (critical["a"] > limits.scale_growth),
        "b": measured & (critical["b"] < limits.gradient_floor),
        "c": enough & (critical["c"] > limits.direction_stability),
        "d": evaluated["d"] & (utility < limits.depth_utility),
    }
    short = ~measured | ~enough
    code = _codes(fires, short)
    sweeps = []
    for key, field, title, comparison, ratio in (
        ("a", "scale_growth", "(a) scale growth", ">", True),
        ("b", "gradient_floor", "(b) gradient floor", "<", True),
        ("c", "direction_stability", "(c) direction stability", ">", False),
        ("d", "depth_utility", "(d) depth utility", "<", False),
    ):
        chosen = evaluated[key]
        one = {**fires, key: np.ones(len(rows), dtype=bool)}
        none = {**fires, key: np.zeros(len(rows), dtype=bool)}
        sweeps.append(
            _sweep(
                field,
                title,
                comparison,
                getattr(limits, field),
                critical[key],
                chosen,
                _codes(one, short),
                _codes(none, short),
                code,
                ratio,
            )
        )
    nobody = np.zeros(len(rows), dtype=bool)
    if_short = _codes({**fires, "c": nobody}, ~nobody)
    drifts = measured & (critical["c"] > limits.direction_stability)
    if_enough = _codes({**fires, "c": drifts}, ~measured)
    sweeps.append(
        _sweep(
            "min_batches",
            "batches that (c) asks for",
            "<",
            limits.min_batches,
            directions,
            measured,
            if_short,
            if_enough,
            code,
            False,
        )
    )
    gains = measured & ~np.isnan(gain)
    sweeps.append(
        _sweep(
            "credit_gain_floor",
            "credit gain (in no verdict)",
            "<",
            limits.credit_gain_floor,
            gain,
            gains,
            code,
            code,
            code,
            True,
        )
    )
    return sweeps


def _codes(fires: dict[str, _Array], short: _Array) -> _Array:
    """Return each checkpoint's verdict as a number."""
    code = sum(flag.astype(np.int64) * _BITS[key] for key, flag in fires.items())
    return np.asarray(np.where((code == 0) & short, _SHORT, code))


def _sweep(
    field: str,
    title: str,
    comparison: str,
    current: float,
    critical: _Array,
    evaluated: _Array,
    if_firing: _Array,
    if_not: _Array,
    now: _Array,
    ratio: bool,
) -> ThresholdSweep:
    """Count outcomes over all thresholds.

    Args:
        critical: value at which each checkpoint changes sides, ``[n]``.
        evaluated: which have one, ``[n]``.
        if_firing, if_not, now: the verdict's code on either side and at present, ``[n]``.
    """
    order = np.flatnonzero(evaluated)
    order = order[np.argsort(critical[order], kind="stable")]
    values = critical[order]
    distinct, starts = np.unique(values, return_index=True)
    finite = distinct[np.isfinite(distinct)]
    # Between two values the checkpoints below are on one side and those above on the other.
    cuts = [*(int(start) for start in starts[np.isfinite(distinct)]), int((values < np.inf).sum())]
    above_fires = comparison == ">"
    rest = ~evaluated

    def cumulative(flags: _Array) -> _Array:
        return np.concatenate([[0], np.cumsum(flags[order])])

    def total(on_firing: _Array, on_not: _Array, fixed: _Array) -> list[int]:
        firing, passing = cumulative(on_firing), cumulative(on_not)
        constant = int(fixed[rest].sum())
        low, high = (passing, firing) if above_fires else (firing, passing)
        return [int(low[cut] + high[-1] - high[cut]) + constant for cut in cuts]

    everyone, nobody = np.ones(len(now), dtype=bool), np.zeros(len(now), dtype=bool)
    counts = [
        total(everyone, nobody, nobody),
        total(if_firing != now, if_not != now, nobody),
        total(if_firing == 0, if_not == 0, now == 0),
        total(
            (if_firing > 0) & (if_firing < _SHORT),
            (if_not > 0) & (if_not < _SHORT),
            (now > 0) & (now < _SHORT),
        ),
        total(if_firing == _SHORT, if_not == _SHORT, now == _SHORT),
    ]
    ends = [None, *(float(v) for v in finite), None]
    intervals = tuple(
        Interval(ends[i], ends[i + 1], *(count[i] for count in counts))
        for i in range(len(finite) + 1)
    )
    below = finite[finite <= current] if above_fires else finite[finite < current]
    above = finite[len(below) :]
    around = [_gap(below[-1], above[0], ratio)] if len(below) and len(above) else []
    neighbours = [_gap(low, high, ratio) for low, high in pairwise(finite)]
    sweep = ThresholdSweep(
        field=field,
        title=title,
        comparison=comparison,
        current=float(current),
        evaluated=len(order),
        fires=0,
        always=int(np.isposinf(values).sum() if above_fires else np.isneginf(values).sum()),
        gap=around[0] if around else None,
        widest=max(neighbours, key=lambda gap: gap.width, default=None),
        intervals=intervals,
    )
    return replace(sweep, fires=sweep.at(current).fires)


def _gap(low: float, high: float, ratio: bool) -> Gap:
    low, high = float(low), float(high)
    if ratio:
        return Gap(low, high, high / low if low > 0 else math.inf, True)
    return Gap(low, high, high - low, False)


__all__ = ["Gap", "Interval", "ThresholdSweep", "sweep_thresholds"]
