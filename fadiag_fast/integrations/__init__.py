"""Callbacks that probe every training step under Lightning, transformers and accelerate.

Each module imports its framework; this one does not. A plain loop needs none of them: see
:class:`fadiag_fast.training.probe.StepProbe`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from ..training.alarms import Alarm, Alarms, TrainingStopped
from ..training.hooks import OfThisRun
from ..training.probe import StepProbe
from ..training.records import StepRecord
from ..training.sinks import Forward, GuardedSink, files_of, guard


class Session(OfThisRun):
    """A probe with its sinks and alarms for the time of one training: what the callbacks share.

    Args:
        model: the module whose forward pass the training calls.
        taps: where to observe; None chooses.
        sinks: anything that :func:`~fadiag_fast.training.sinks.as_sink` takes, each on a thread
            of its own.
        loggers: the same, called on the training's thread: a framework's own loggers are used there
            by the framework too.
        alarms: what judges the records; None warns by the default limits, False judges nothing.
        first_step: optimiser steps done before, as after a checkpoint.
        probe_options: further arguments of StepProbe.

    Attributes:
        probe: the StepProbe.
        alarms: what judges; None for nothing.
        latest: the record that came last.
        stopped: what an alarm whose actions hold ``"stop"`` has raised; None before.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Any = None,
        *,
        sinks: Sequence[Any] = (),
        loggers: Sequence[Any] = (),
        alarms: Alarms | Literal[False] | None = None,
        first_step: int = 0,
        **probe_options: Any,
    ) -> None:
        self.sinks: list[GuardedSink] = [
            *(guard(sink) for sink in sinks),
            *(guard(logger, threaded=False) for logger in loggers),
        ]
        self.alarms = None if alarms is False else alarms or Alarms()
        self.latest: StepRecord | None = None
        self.stopped: TrainingStopped | None = None
        self._told = 0 if self.alarms is None else len(self.alarms.events)
        take = guard(self._take, threaded=False)
        self.probe = StepProbe(
            model, taps, sink=take, alarms=False, first_step=first_step, **probe_options
        )
        self._tell_events = Forward(self.alarms, self.sinks)
        self.probe.share.judged = self.alarms is not None
        for file in (file for sink in self.sinks for file in files_of(sink)):
            file.share = self.probe.share

    def _take(self, record: StepRecord) -> None:
        self.latest = record
        for sink in self.sinks:
            sink(record)
        if self.alarms is not None:
            try:
                self.alarms(record)
            except TrainingStopped as stop:
                # A framework stops by a flag of its own, at the end of the step.
                self.stopped = self.stopped or stop
            self._tell_events()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self) -> list[Alarm]:
        """Probe a step, after its backward pass; return the alarms that have come since."""
        self.probe.step()
        return self._new_alarms()

    def is_trained_by(self, optimizer: Any) -> bool:
        """Return whether an optimiser holds a parameter of the probed model."""
        mine = {id(parameter) for parameter in self.probe.model.parameters()}
        return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])

    def _new_alarms(self) -> list[Alarm]:
        if self.alarms is None:
            return []
        events = self.alarms.events[self._told :]
        self._told += len(events)
        return [event for event in events if isinstance(event, Alarm)]

    def close(self) -> list[Alarm]:
        """Hand on what is under way, remove the probe and close what was opened here.

        Returns:
            The alarms that have come since the last step.
        """
        try:
            self.probe.flush()
        except Exception as error:  # the training's own error, if there is one, matters more
            warnings.warn(f"fadiag: the last records are lost: {error}", stacklevel=2)
        self.probe.remove()
        for sink in self.sinks:
            sink.close()
        return self._new_alarms()


def as_list(sinks: Any) -> list[Any]:
    """Return one sink or several as a list; None is none."""
    if sinks is None:
        return []
    return list(sinks) if isinstance(sinks, (list, tuple)) else [sinks]
