"""Alarms and all-clears: what is told, and what a training may do about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..._common.jsonio import number, strict
from ..records import is_of_kind

HIDDEN_NORM, GROWTH, CREDIT_GAIN, GRAD_NORM = "hidden_norm", "growth", "credit_gain", "grad_norm"


NON_FINITE, SCALE_GROWTH, GRADIENT_FLOOR, BASELINE = (
    "non-finite",
    "scale growth",
    "gradient floor",
    "baseline",
)


class TrainingStopped(RuntimeError):
    """Stop a training run, for an alarm asked for it.

    Attributes:
        alarm: what fired.
    """

    def __init__(self, alarm: Alarm) -> None:
        super().__init__(f"{alarm.sentence} Training is stopped, as the alarm's action asks.")
        self.alarm = alarm


class AlarmWarning(UserWarning):
    """Category of the warnings that alarms raise."""


@dataclass(frozen=True)
class Alarm:
    """What fired, with its evidence.

    Attributes:
        step: the first step at which the rule was met in this episode.
        reported_at: the step whose record made it fire.
        layer: name of the hidden state concerned.
        rule: ``non-finite``, ``scale growth``, ``gradient floor`` or ``baseline``.
        figure: ``hidden_norm``, ``growth``, ``credit_gain`` or ``grad_norm``.
        value: the figure at ``step``.
        threshold: the limit that ``value`` passed; the published one, or the baseline's.
        baseline_median: median of the figure over the healthy past, of a norm at the number of
            features of ``step``; NaN where there is none.
        baseline_mad: median absolute deviation of its natural logarithm there; NaN likewise.
        last_healthy_step: the last recorded step at which all was well; None if there was none.
        sentence: all of it in words.
    """

    step: int
    reported_at: int
    layer: str
    rule: str
    figure: str
    value: float
    threshold: float
    baseline_median: float
    baseline_mad: float
    last_healthy_step: int | None
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON; NaN and infinities stand as in a record's."""
        return {"event": "alarm", **strict(asdict(self))}


@dataclass(frozen=True)
class AllClear:
    """The end of an episode.

    Attributes:
        step: the recorded step at which the episode ended.
        since: the first step of the episode.
        alarms: how many alarms it had.
        settled: whether the figures are well again (False) or have stayed so long at another level
            that they are judged anew from there (True).
        sentence: it in words.
    """

    step: int
    since: int
    alarms: int
    settled: bool
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {"event": "all clear", **asdict(self)}


Event = Alarm | AllClear


Action = str | Callable[[Alarm], Any]


_NUMBERS = ("value", "threshold", "baseline_median", "baseline_mad")


def event_from_dict(values: Mapping[str, Any]) -> Event:
    """Return the event of :meth:`Alarm.to_dict` or :meth:`AllClear.to_dict`.

    Raises:
        ValueError: neither of them, or a field is missing.
    """
    kind = {"alarm": Alarm, "all clear": AllClear}.get(str(values.get("event")))
    if kind is None:
        raise ValueError(f"alarms: expected an alarm or an all clear, got {values.get('event')!r}")
    names = [one.name for one in fields(kind)]
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"alarms: {values['event']}: expected {', '.join(missing)}, got none")
    found = {name: values[name] for name in names}
    for name in _NUMBERS:
        if name in found:
            found[name] = float(number(found[name]))
    for one in fields(kind):
        if not is_of_kind(str(one.type), found[one.name]):
            raise ValueError(
                f"alarms: {values['event']}: {one.name}: expected {one.type}, got "
                f"{found[one.name]!r}"
            )
    event: Event = kind(**found)
    return event
