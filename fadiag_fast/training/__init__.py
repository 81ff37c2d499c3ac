"""Probe every step of a training run from inside its own forward and backward passes."""

from .probe import StepProbe
from .records import StepRecord

__all__ = ["StepProbe", "StepRecord"]
