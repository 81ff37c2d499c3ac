"""Probe every step of a training run from inside its own forward and backward passes.

A :class:`StepProbe` makes a :class:`StepRecord` of each step, :class:`Alarms` judge the series, and
sinks take it where it is kept.
"""

from .alarms import (
    Alarm,
    AlarmPolicy,
    Alarms,
    AlarmWarning,
    AllClear,
    TrainingStopped,
    judge_series,
)
from .options import DirectionOptions
from .probe import StepProbe
from .records import StepRecord
from .sinks import JsonLines, SinkWarning, as_sink, guard, read_jsonlines

__all__ = [
    "Alarm",
    "AlarmPolicy",
    "AlarmWarning",
    "Alarms",
    "AllClear",
    "DirectionOptions",
    "JsonLines",
    "SinkWarning",
    "StepProbe",
    "StepRecord",
    "TrainingStopped",
    "as_sink",
    "guard",
    "judge_series",
    "read_jsonlines",
]
