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

from .events import Alarm, AlarmWarning, AllClear, Event, TrainingStopped, event_from_dict
from .judge import Alarms, judge_series
from .policy import AlarmPolicy

__all__ = [
    "Alarm",
    "AlarmPolicy",
    "AlarmWarning",
    "Alarms",
    "AllClear",
    "Event",
    "TrainingStopped",
    "event_from_dict",
    "judge_series",
]
