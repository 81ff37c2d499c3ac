"""The alarms of a run: what each record meets, and the episodes that follow."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import truediv
from typing import Any

from ..records import StepRecord
from .baseline import Baseline
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
    AllClear,
    Event,
)
from .policy import AlarmPolicy
from .reactions import Reactions
from .rules import Finding, beyond_protocol, first_cause, forward_cause, non_finite
from .series import (
    Array,
    figures_of,
    norms_per_feature,
)

# Reporting priority: a gradient at the floor may follow from what the others place. Within an
# episode, only alarms of equal or higher severity (a lower number) are reported.
_SEVERITY = {NON_FINITE: 0, SCALE_GROWTH: 1, BASELINE: 2, GRADIENT_FLOOR: 1}


# The step of a record, its findings per rule, and the healthy step before it.
_Judged = tuple[int, dict[str, list[Finding]], int | None]


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
        self._reactions = Reactions(actions, save, on_event)
        self.events: list[Event] = []
        self.last_healthy_step: int | None = None
        self._observed: tuple[tuple[str, ...], str] | None = None
        self._start_anew(())

    def _start_anew(self, layers: tuple[str, ...]) -> None:
        self._layers = layers
        self._seen = 0
        self._forget()

    def _forget(self) -> None:
        self._baseline = Baseline(self.policy, len(self._layers))
        # Per record of the last few: its step, its findings per rule, the healthy step before it.
        self._last: deque[_Judged] = deque(maxlen=self.policy.among)
        self._troubled = 0  # how many of them have findings
        self._acted: set[str] = set()
        self._episode_start: int | None = None
        self._episode_records = 0
        self._quiet = 0

    @property
    def actions(self) -> Sequence[Action]:
        return self._reactions.actions

    @property
    def stop_requested(self) -> bool:
        return self._reactions.stop_requested

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
            self._start_anew(record.layers)
            self._observed = observed
        if record.skipped or not record.layers:
            # The scaler has met an infinity, lowered its factor and left the weights as they were.
            return None
        self._seen += 1
        plain = self._plainly_healthy(record)
        if plain is not None:
            self._last.append((record.step, {}, self.last_healthy_step))
            self.last_healthy_step = record.step
            self._baseline.wait(plain)
            return None
        self._baseline.learn_all()
        values = figures_of(record)
        found = self._findings(record, values)
        by_rule: dict[str, list[Finding]] = {}
        for finding in found:
            by_rule.setdefault(finding.rule, []).append(finding)
        self._last.append((record.step, by_rule, self.last_healthy_step))
        self._troubled = sum(bool(entry[1]) for entry in self._last)
        alarms = self._fire(record)
        cleared = None
        if not found:
            self.last_healthy_step = record.step
        if self._episode_start is None:
            if not found and self._seen > self.policy.warmup:
                self._baseline.learn(values)
        elif not alarms:
            cleared = self._end_of_episode(record, values, bool(found))
        events: list[Event] = [*alarms, *([cleared] if cleared else [])]
        for event in events:
            self.events.append(event)
            self._reactions.tell(event)
        if alarms:
            alone, first = len(self._acted) == 1, next(iter(self.active), None)
            self._reactions.act([(alarm, alone or alarm is first) for alarm in alarms])
        return events[0] if events else None

    # -- what a record meets

    def _plainly_healthy(self, record: StepRecord) -> tuple[float, ...] | None:
        """Return the figures of a record that can meet no rule; None if it must be judged.

        By plain comparisons, which do for nearly every record of a run: a training loop that
        computes for two milliseconds a step would feel the whole judgement.
        """
        if not self._baseline.has_bounds or self._troubled or record.unreached:
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
        return values if self._baseline.holds(values) else None

    def _findings(self, record: StepRecord, values: Array) -> list[Finding]:
        found = non_finite(record)
        judged = self._seen > self.policy.warmup
        if found and found[0].figure == GRAD_NORM:
            # What broke in the forward pass comes before the gradients that it spoils.
            others = self._beyond(record, values, 1.0)
            return [forward_cause(record, found[0], others, judged) or found[0]]
        if found or not judged:
            # Nothing can be said of figures beside an infinite one.
            return found
        return self._beyond(record, values, 1.0)

    def _beyond(self, record: StepRecord, values: Array, level: float) -> list[Finding]:
        """Return what passes ``level`` times the thresholds, published and of the baseline."""
        return [
            *beyond_protocol(record, self.policy, level),
            *self._baseline.deviations(record, values, level),
        ]

    # -- episodes

    def _fire(self, record: StepRecord) -> list[Alarm]:
        """Return alarms of rules that are met often, unless the episode has had a graver one."""
        alarms = []
        for rule, severity in _SEVERITY.items():
            if rule in self._acted or any(_SEVERITY[other] < severity for other in self._acted):
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
            finding = first_cause(by_rule[rule])
            alarms.append(self._alarm(finding, step, record.step, healthy))
        return alarms

    def _same_figure(self, met: list[_Judged]) -> list[_Judged]:
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

    def _alarm(self, finding: Finding, step: int, now: int, healthy: int | None) -> Alarm:
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
        near = met or bool(self._beyond(record, values, level))
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
        only_baseline = self._acted == {BASELINE} and not beyond_protocol(record, policy, 1.0)
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


def judge_series(records: Iterable[StepRecord], policy: AlarmPolicy | None = None) -> list[Event]:
    """Return the alarms and all clears of a series that has been recorded."""
    alarms = Alarms(policy, actions=())
    for record in records:
        alarms(record)
    return alarms.events
