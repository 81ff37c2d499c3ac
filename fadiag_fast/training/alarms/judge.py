"""Judge a series of step records, and say with the evidence when something breaks.

Three rules, each with its own memory of what fired:

- *non-finite*: a norm of a hidden state or of a gradient is infinite or NaN. At once, also in the
  warm-up.
- *protocol*: (a) growth above 50 at a layer; (b) the gradient at the floor, read by the credit gain
  of the deepest state, for ‖g_L‖ itself falls also when the task gets solved. Direction stability
  only says, beside (b), whether the lost gradient drifts or is noise.
- *baseline*: the logarithms of hidden norms, of growth per step of depth and of credit gains
  against the median and the median absolute deviation (MAD) of the run's own healthy past. Norms
  are compared per feature (root mean square): a longer sequence or a larger image is no change.

A rule fires when it is met in k of the last m records. What is slow is health: a baseline figure
must be far from its median in MADs **and** have moved by a factor since the last healthy records,
or be out of all proportion. Records that deviate never enter the baseline, so a broken level does
not become the new normal by itself.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import truediv
from typing import Any

import numpy as np

from ..._common.warn import user_level
from ...protocol import growth_ratios, middle_layer
from ..records import StepRecord
from .events import (
    BASELINE,
    CREDIT_GAIN,
    GRAD_NORM,
    GRADIENT_FLOOR,
    GROWTH,
    HIDDEN_NORM,
    NON_FINITE,
    SCALE_GROWTH,
    Action,
    Alarm,
    AlarmWarning,
    AllClear,
    Event,
    TrainingStopped,
)
from .policy import RECENT, AlarmPolicy
from .series import (
    MAD_TO_SIGMA,
    Array,
    exp,
    figures_of,
    log_of_features,
    median_of,
    norms_per_feature,
    place,
    within,
)

# They are taken anew after so many; how far they can have moved is known without their medians.
_RECENT_REFRESH = 3
# The baseline is computed anew once so many healthy records have come: a tenth of it is stale.
_REFRESH = 30


# In the order of telling: a gradient at the floor may follow from what the others place. Of an
# episode only what is at least as grave (lower) as the alarms before it is told.
_GRAVITY = {NON_FINITE: 0, SCALE_GROWTH: 1, BASELINE: 2, GRADIENT_FLOOR: 1}

_log = logging.getLogger("fadiag_fast.training")


@dataclass
class _Finding:
    """A rule that one record meets: the evidence before it is put into words."""

    rule: str
    figure: str
    layer: str
    value: float
    threshold: float
    median: float = math.nan
    mad: float = math.nan
    note: str = ""


class Alarms:
    """Judge records as they come; give it to a probe as a sink, or call it with each record.

    Args:
        policy: the limits.
        actions: what an alarm does, in this order: ``"warn"`` (a Python warning), ``"log"`` (the
            logger ``fadiag_fast.training``), ``"stop"`` (raise :class:`TrainingStopped` once the
            other actions are done), ``"save"`` (call ``save``) or a function that takes the
            :class:`Alarm`. In an episode each rule acts once, and only if no graver one has:
            non-finite is the gravest, then come the protocol's limits, then the baseline.
        save: called with the first alarm of an episode; it should write a checkpoint.
        on_event: called with every :class:`Alarm` and :class:`AllClear`; ``JsonLines.event`` keeps
            them beside the records.

    Attributes:
        events: all alarms and all clears so far.
        stop_requested: whether ``"stop"`` was among the actions of an alarm.
        last_healthy_step: the last judged step at which no rule was met; None before one.

    A function of yours that raises is not called again, after one warning; training goes on.

    Raises:
        ValueError: an unknown action, or ``"save"`` without ``save``.
    """

    # A sink on a thread of its own could not stop the training.
    synchronous = True

    def __init__(
        self,
        policy: AlarmPolicy | None = None,
        *,
        actions: Sequence[Action] | Action = ("warn",),
        save: Callable[[Alarm], Any] | None = None,
        on_event: Callable[[Event], Any] | None = None,
    ) -> None:
        self.policy = policy or AlarmPolicy()
        self.actions = (actions,) if isinstance(actions, str) or callable(actions) else actions
        for action in self.actions:
            if not callable(action) and action not in ("warn", "log", "stop", "save"):
                raise ValueError(
                    f"Alarms: expected the actions warn, log, stop, save or a function, got "
                    f"{action!r}"
                )
        if "save" in self.actions and save is None:
            raise ValueError("Alarms: the action save: expected save, a function, got None")
        self._save = save
        self._on_event = on_event
        self._broken: set[int] = set()
        self.events: list[Event] = []
        self.stop_requested = False
        self.last_healthy_step: int | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self._observed: tuple[tuple[str, ...], str] | None = None
        self._layers: tuple[str, ...] | None = None
        self._seen = 0
        self._forget()

    def _forget(self) -> None:
        # The healthy figures of the last records, a row each, the oldest overwritten first.
        self._history: Array = np.empty((self.policy.window, 0))
        self._learned = 0
        self._since_refresh = 0
        self._median: Array | None = None
        self._mad: Array | None = None
        # Figures of records that were plainly healthy, not yet in the history.
        self._waiting: list[tuple[float, ...]] = []
        self._bounds: tuple[list[float], list[float]] | None = None
        # Narrower ones, which no healthy record that they hold can move.
        self._lasting: tuple[list[float], list[float]] | None = None
        # Per record of the last few: its step, its findings per rule, the healthy step before it.
        self._last: deque[tuple[int, dict[str, list[_Finding]], int | None]] = deque(
            maxlen=self.policy.among
        )
        self._troubled = 0  # how many of them have findings
        self._acted: set[str] = set()
        self._episode_start: int | None = None
        self._episode_records = 0
        self._quiet = 0

    @property
    def active(self) -> tuple[Alarm, ...]:
        """The alarms of the episode that stands; empty when all is well."""
        if self._episode_start is None:
            return ()
        found: list[Alarm] = []
        for event in reversed(self.events):
            if isinstance(event, AllClear):
                break
            found.append(event)
        return tuple(reversed(found))

    def __call__(self, record: StepRecord) -> Event | None:
        """Judge the next record.

        Returns:
            The alarm or all clear that it caused, the first if several; else None.

        Raises:
            TrainingStopped: an alarm fired, and ``"stop"`` is among the actions.
        """
        observed = (record.layers, record.gain_reference)
        if observed != self._observed:
            # Other hidden states, or other gains: nothing of the past can be compared with them.
            self._start_anew()
            self._observed, self._layers = observed, record.layers
        if record.skipped or not record.layers:
            # The scaler has met an infinity, lowered its factor and left the weights as they were.
            return None
        self._seen += 1
        plain = self._plainly_healthy(record)
        if plain is not None:
            self._last.append((record.step, {}, self.last_healthy_step))
            self.last_healthy_step = record.step
            self._waiting.append(plain)
            count = len(self._waiting)
            due = self._lasting is None or self._since_refresh + count >= _REFRESH
            if due and count % _RECENT_REFRESH == 0:
                self._learn_waiting(count)
                # Not beside a refresh: both at once take as long as a small step in a CUDA graph.
                if self._since_refresh:
                    self._bound_lasting()
            return None
        self._learn_waiting(len(self._waiting))
        values = figures_of(record)
        found = self._findings(record, values)
        by_rule: dict[str, list[_Finding]] = {}
        for finding in found:
            by_rule.setdefault(finding.rule, []).append(finding)
        self._last.append((record.step, by_rule, self.last_healthy_step))
        self._troubled = sum(bool(entry[1]) for entry in self._last)
        alarms = self._fire(record)
        cleared = None
        if not found:
            self.last_healthy_step = record.step
        if self._episode_start is None:
            if not found:
                self._learn(values)
        elif not alarms:
            cleared = self._end_of_episode(record, values, bool(found))
        events: list[Event] = [*alarms, *([cleared] if cleared else [])]
        for event in events:
            self._tell(event)
        if alarms:
            self._act(alarms)
        return events[0] if events else None

    # -- what a record meets

    def _plainly_healthy(self, record: StepRecord) -> tuple[float, ...] | None:
        """Return the figures of a record that can meet no rule; None if it must be judged.

        By plain comparisons, which do for nearly every record of a run: a training loop that
        computes for two milliseconds a step would feel the whole judgement.
        """
        if self._bounds is None or self._troubled or record.unreached:
            return None
        hidden = record.hidden_norms
        if self._episode_start is not None or 0.0 in hidden or 0.0 in record.credit_gains:
            return None
        if not math.isfinite(sum(record.grad_norms)):
            return None
        growth: Iterable[float] = map(truediv, hidden[1:], hidden)
        if record.chain_starts:
            growth = [1.0 if l in record.chain_starts else g for l, g in enumerate(growth, 1)]
        values = (*norms_per_feature(record), *growth, *record.credit_gains)
        if self._lasting is not None:
            if within(self._lasting, values):
                return values
            # The bounds move with whole groups of those that wait.
            self._lasting = None
            self._learn_waiting(len(self._waiting) // _RECENT_REFRESH * _RECENT_REFRESH)
        return values if self._bounds is not None and within(self._bounds, values) else None

    def _bound(self) -> None:
        """Note between which figures nothing deviates and no limit is passed."""
        self._bounds = None
        if self._median is not None and self.policy.floor == "credit_gain":
            jump, far = self._steps(self._num_layers)
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
        jump, far = self._steps(self._num_layers)
        latest = median_of(rows)
        low = np.maximum(latest, self._recent) - jump / 2
        high = np.minimum(latest, self._recent) + jump / 2
        # What judges now is a little older than the latest: it must lie there too.
        if (low <= self._recent).all() and (self._recent <= high).all():
            low, high = np.maximum(low, self._median - far), np.minimum(high, self._median + far)
            self._lasting = self._between(low, high)

    def _between(self, low: Array, high: Array) -> tuple[list[float], list[float]]:
        """Return the figures of bounds of logarithms, no farther than the published limits."""
        limits, n = self.policy.thresholds, self._num_layers
        low, high = np.exp(low), np.exp(high)
        high[n : 2 * n - 1] = np.minimum(high[n : 2 * n - 1], limits.scale_growth)
        low[-1] = max(low[-1], limits.credit_gain_floor)
        return low.tolist(), high.tolist()

    @property
    def _num_layers(self) -> int:
        return 0 if self._layers is None else len(self._layers)

    def _steps(self, n: int) -> tuple[Array, Array]:
        """Return by what a logarithm has jumped, and what is far, for figures of n states."""
        jump = np.full(3 * n - 1, math.log(self.policy.jump))
        jump[2 * n - 1 :] = math.log(self.policy.gain_jump)
        # A gain may wander over decades while a task gets solved: only its jumps count.
        far = np.full(3 * n - 1, math.log(self.policy.far))
        far[2 * n - 1 :] = math.inf
        return jump, far

    def _findings(self, record: StepRecord, values: Array) -> list[_Finding]:
        found = self._non_finite(record)
        if found and found[0].figure == GRAD_NORM:
            # What broke in the forward pass comes before the gradients that it spoils.
            return [self._forward_cause(record, values, found[0]) or found[0]]
        if found or self._seen <= self.policy.warmup:
            # Nothing can be said of figures beside an infinite one.
            return found
        return [*self._protocol(record, 1.0), *self._deviations(record, values, 1.0)]

    def _forward_cause(
        self, record: StepRecord, values: Array, gradient: _Finding
    ) -> _Finding | None:
        """Return where the forward pass broke in a record whose gradients are not finite."""
        judged = self._seen > self.policy.warmup
        causes = [
            finding
            for finding in (*self._protocol(record, 1.0), *self._deviations(record, values, 1.0))
            if finding.figure in (HIDDEN_NORM, GROWTH)
        ]
        grown = [finding for finding in causes if finding.rule == SCALE_GROWTH]
        if not judged:
            # A young network may grow: only the block at which the gradient is lost is suspect.
            after = record.layers.index(gradient.layer) + 1
            grown = [f for f in grown if f.layer in record.layers[after - 1 : after + 1]]
            causes = []
        if not (grown or causes):
            return None
        cause = grown[0] if grown else _first_cause(causes)
        note = f" The median ‖g‖ at {gradient.layer} is {gradient.value:.3g}."
        return replace(cause, rule=NON_FINITE, note=note)

    def _non_finite(self, record: StepRecord) -> list[_Finding]:
        for figure, norms in ((HIDDEN_NORM, record.hidden_norms), (GRAD_NORM, record.grad_norms)):
            bad = [
                l
                for l, norm in enumerate(norms)
                if not math.isfinite(norm) and record.layers[l] not in record.unreached
            ]
            if bad:
                # Data flow down the depth in the forward pass, and up in the backward pass.
                at = bad[0] if figure == HIDDEN_NORM else bad[-1]
                note = ""
                following = at + 1
                if (
                    figure == GRAD_NORM
                    and following < len(norms)
                    and following not in record.chain_starts
                    and math.isfinite(norms[following])
                ):
                    note = (
                        f" At {record.layers[following]} it is {norms[following]:.3g}: it breaks "
                        f"on the way back through that block."
                    )
                name = record.layers[at]
                return [_Finding(NON_FINITE, figure, name, norms[at], math.inf, note=note)]
        return []

    def _protocol(self, record: StepRecord, level: float) -> list[_Finding]:
        """Return what passes ``level`` times the published limits."""
        limits, found = self.policy.thresholds, []
        reached = [name not in record.unreached for name in record.layers]
        ratios = growth_ratios(record.hidden_norms, record.chain_starts)
        grown = [
            (ratio, l + 1)
            for l, ratio in enumerate(ratios)
            if reached[l] and reached[l + 1] and ratio > limits.scale_growth * level
        ]
        if grown:
            ratio, at = max(grown)
            found.append(
                _Finding(SCALE_GROWTH, GROWTH, record.layers[at], ratio, limits.scale_growth)
            )
        by_gain = self.policy.floor == "credit_gain"
        value = (record.credit_gains if by_gain else record.grad_norms)[-1]
        floor = limits.credit_gain_floor if by_gain else limits.gradient_floor
        if reached[-1] and value < floor / level:
            found.append(
                _Finding(
                    GRADIENT_FLOOR,
                    CREDIT_GAIN if by_gain else GRAD_NORM,
                    record.layers[-1],
                    value,
                    floor,
                    note=self._mode(record),
                )
            )
        return found

    def _mode(self, record: StepRecord) -> str:
        stability = record.stabilities[middle_layer(len(record.layers))]
        if math.isnan(stability):
            return ""
        if stability > self.policy.thresholds.direction_stability:
            return f" Its direction stays the same from step to step ({stability:.2f}): drift."
        return f" Its direction differs from step to step ({stability:.2f}): noise."

    def _deviations(self, record: StepRecord, values: Array, level: float) -> list[_Finding]:
        """Return the figures that deviate from the baseline, by ``level`` times the limits."""
        if self._median is None or self._mad is None:
            return []
        policy, n = self.policy, len(record.layers)
        sigma = MAD_TO_SIGMA * self._mad
        away = values - self._median
        moved = values - self._recent
        jump, far = self._steps(n)
        with np.errstate(invalid="ignore"):
            # A jump must lead away from the baseline, not back to it.
            jumped = (np.abs(moved) > level * jump) & (np.sign(moved) == np.sign(away))
            beyond = np.abs(away) > level * policy.deviations * sigma
            hits = beyond & (jumped | (np.abs(away) > level * far))
        found = []
        for index in np.flatnonzero(hits):
            figure, l = place(int(index), n)
            limit = max(policy.deviations * sigma[index], jump[index])
            # Compared per feature, told as the norm of all features that there are now.
            features = log_of_features(record, l) if figure == HIDDEN_NORM else 0.0
            middle = self._median[index] + features
            found.append(
                _Finding(
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

    # -- episodes

    def _fire(self, record: StepRecord) -> list[Alarm]:
        """Return alarms of rules that are met often, unless the episode has had a graver one."""
        alarms = []
        for rule, gravity in _GRAVITY.items():
            if rule in self._acted or any(_GRAVITY[other] < gravity for other in self._acted):
                continue
            met = [entry for entry in self._last if rule in entry[1]]
            if rule == NON_FINITE:
                lasting = met[-1:]
            elif rule == BASELINE:
                lasting = self._same_figure(met)
            else:
                lasting = met if len(met) >= self.policy.fires else []
            if not lasting:
                continue
            step, by_rule, healthy = lasting[0]
            self._acted.add(rule)
            if self._episode_start is None:
                self._episode_start, self._episode_records = step, 0
                # Nothing is healthy between the first record that met a rule and this one.
                self.last_healthy_step = healthy
            finding = _first_cause(by_rule[rule])
            alarms.append(self._alarm(finding, step, record.step, healthy))
        return alarms

    def _same_figure(
        self, met: list[tuple[int, dict[str, list[_Finding]], int | None]]
    ) -> list[tuple[int, dict[str, list[_Finding]], int | None]]:
        """Return the records of the baseline rule with only the figures that deviate often."""
        counts: dict[tuple[str, str], int] = {}
        for _, by_rule, _ in met:
            for finding in by_rule[BASELINE]:
                key = finding.figure, finding.layer
                counts[key] = counts.get(key, 0) + 1
        lasting = {key for key, count in counts.items() if count >= self.policy.fires}
        kept = []
        for step, by_rule, healthy in met:
            findings = [f for f in by_rule[BASELINE] if (f.figure, f.layer) in lasting]
            if findings:
                kept.append((step, {BASELINE: findings}, healthy))
        return kept

    def _alarm(self, finding: _Finding, step: int, now: int, healthy: int | None) -> Alarm:
        symbol = {
            HIDDEN_NORM: "the median ‖h‖",
            GROWTH: "the growth of the median ‖h‖ into it",
            CREDIT_GAIN: "the median credit gain",
            GRAD_NORM: "the median ‖g‖",
        }[finding.figure]
        side = "above" if finding.value > finding.threshold else "below"
        what = f"step {step}, {finding.layer}: {symbol} is {finding.value:.3g}"
        if finding.rule != NON_FINITE or math.isfinite(finding.threshold):
            what += f", {side} the limit {finding.threshold:.3g}"
        if not math.isnan(finding.median):
            what += f"; over the run's healthy past its median was {finding.median:.3g}"
        last = (
            "no step before was judged healthy"
            if healthy is None
            else f"the last step at which all was well is {healthy}"
        )
        return Alarm(
            step,
            now,
            finding.layer,
            finding.rule,
            finding.figure,
            finding.value,
            finding.threshold,
            finding.median,
            finding.mad,
            healthy,
            f"{finding.rule}: {what}; {last}.{finding.note}",
        )

    def _end_of_episode(self, record: StepRecord, values: Array, met: bool) -> AllClear | None:
        self._episode_records += 1
        level = self.policy.clear_level
        near = met or bool(self._protocol(record, level) or self._deviations(record, values, level))
        self._quiet = 0 if near else self._quiet + 1
        policy, start, count = self.policy, self._episode_start, len(self._acted)
        assert start is not None
        if self._quiet >= policy.clears:
            self._acted.clear()
            self._episode_start, self._quiet = None, 0
            return AllClear(
                record.step,
                start,
                count,
                False,
                f"All clear at step {record.step}: {policy.clears} records in a row are well "
                f"again. The episode began at step {start}.",
            )
        only_baseline = self._acted == {BASELINE} and not (self._protocol(record, 1.0))
        if policy.settles is not None and self._episode_records >= policy.settles and only_baseline:
            self._forget()
            return AllClear(
                record.step,
                start,
                count,
                True,
                f"All clear at step {record.step}: the figures have stayed at another level for "
                f"{policy.settles} records and are judged anew from there. The episode began at "
                f"step {start}.",
            )
        return None

    # -- the baseline

    def _learn_waiting(self, count: int) -> None:
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
            self._learn(values, count - at)

    def _learn(self, values: Array, more: int = 0) -> None:
        """Put healthy figures into the baseline; ``more`` follow at once."""
        if self._seen <= self.policy.warmup:
            return
        self._lasting = None
        if self._history.shape[1] != len(values):
            self._history = np.empty((self.policy.window, len(values)))
        self._history[self._learned % len(self._history)] = values
        self._learned += 1
        self._since_refresh += 1
        if self._learned < self.policy.min_window:
            return
        # Of several refreshes at once only the last one is seen.
        due = self._since_refresh % _RECENT_REFRESH == 0 and more < _RECENT_REFRESH
        if self._median is None or due:
            self._recent: Array = median_of(self._latest())
            self._bounds = None
        if self._median is None or self._since_refresh >= _REFRESH:
            past = self._history[: self._learned]
            self._median = median_of(past)
            self._mad = np.maximum(median_of(np.abs(past - self._median)), self.policy.min_mad)
            self._since_refresh = 0
            self._bounds = None
        if self._bounds is None and more < _RECENT_REFRESH:
            self._bound()

    def _latest(self) -> Array:
        """Return the figures of the last healthy records, a row each."""
        places = np.arange(self._learned - RECENT, self._learned) % len(self._history)
        return self._history[places]

    # -- what follows

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, AllClear) and "log" in self.actions:
            _log.info("%s", event.sentence)
        if self._on_event is not None:
            self._call(self._on_event, event, "on_event")

    def _act(self, alarms: Iterable[Alarm]) -> None:
        stop: Alarm | None = None
        for alarm in alarms:
            first = len(self._acted) == 1 or alarm is next(iter(self.active), None)
            for action in self.actions:
                if action == "warn":
                    warnings.warn(alarm.sentence, AlarmWarning, stacklevel=user_level())
                elif action == "log":
                    _log.warning("%s", alarm.sentence)
                elif action == "stop":
                    stop = stop or alarm
                elif action == "save":
                    if first and self._save is not None:
                        self._call(self._save, alarm, "save")
                elif callable(action):
                    self._call(action, alarm, "an action")
        if stop is not None:
            self.stop_requested = True
            raise TrainingStopped(stop)

    def _call(self, function: Callable[[Any], Any], argument: Any, name: str) -> None:
        if id(function) in self._broken:
            return
        try:
            function(argument)
        except TrainingStopped:
            raise
        except Exception as error:
            self._broken.add(id(function))
            warnings.warn(
                f"Alarms: {name}: {function!r} raised {type(error).__name__}: {error}. It is not "
                f"called again; training goes on.",
                AlarmWarning,
                stacklevel=user_level(),
            )


def judge_series(records: Iterable[StepRecord], policy: AlarmPolicy | None = None) -> list[Event]:
    """Return the alarms and all clears of a series that has been recorded."""
    alarms = Alarms(policy, actions=())
    for record in records:
        alarms(record)
    return alarms.events


def _first_cause(findings: list[_Finding]) -> _Finding:
    """Return the finding to name: the shallowest state that a break of the forward pass shows at.

    What breaks at a layer passes on to all that follow, so the shallowest comes first; it must have
    moved half as far as the farthest, lest the noise of another be named. Gradients break from the
    head down: without a hidden state among the findings the deepest gain is named.
    """

    def moved(finding: _Finding) -> float:
        if not (finding.value > 0 and finding.median > 0):
            return math.inf
        return abs(math.log(finding.value) - math.log(finding.median))

    forward = [finding for finding in findings if finding.figure in (HIDDEN_NORM, GROWTH)]
    if not forward:
        return findings[-1]
    farthest = max(moved(finding) for finding in forward)
    large = [finding for finding in forward if moved(finding) >= farthest / 2]
    hidden = [finding for finding in large if finding.figure == HIDDEN_NORM]
    return (hidden or large)[0]
