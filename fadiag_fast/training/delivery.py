"""Hand records to the sinks and the alarms, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from .alarms import Alarms, TrainingStopped
from .exchange import Share
from .records import StepRecord
from .sinks import Forward, GuardedSink, files_of, guard


class Delivery:
    """Where the records of a probe go.

    Args:
        sink, alarms, group: as :class:`.StepProbe` has them.

    Attributes:
        alarms: what judges the records; None for nothing.
        share: whose figures the records are.

    Raises:
        TypeError: ``alarms`` is neither Alarms nor None nor False; a sink has an unsupported type.
    """

    def __init__(self, sink: Any, alarms: Alarms | Literal[False] | None, group: Any) -> None:
        given = [] if sink is None else sink if isinstance(sink, list | tuple) else [sink]
        self._sinks: list[GuardedSink] = [guard(one) for one in given]
        self._own_sinks = [
            made for made, one in zip(self._sinks, given, strict=True) if made is not one
        ]
        if not (alarms is None or alarms is False or isinstance(alarms, Alarms)):
            raise TypeError(f"StepProbe: alarms: expected Alarms, None or False, got {alarms!r}")
        self.alarms = None if alarms is False else alarms or Alarms()
        judges = [] if self.alarms is None else [self.alarms]
        self._takers: list[Callable[[StepRecord], Any]] = [*self._sinks, *judges]
        self._tell_events = Forward(self.alarms, self._sinks)
        self.share = Share(group, judged=self.alarms is not None)
        self.share.look()
        self.share_files(self._sinks)

    def share_files(self, sinks: Sequence[Any]) -> None:
        """Let the files among some sinks know which rank writes them."""
        for file in (file for one in sinks for file in files_of(one)):
            file.share = self.share

    def hand_out(self, records: Sequence[StepRecord]) -> None:
        """Give records to all sinks and to the alarms.

        Raises:
            TrainingStopped: an alarm stops the training; the other records are handed out first.
        """
        stop: TrainingStopped | None = None
        for record in records:
            for taker in self._takers:
                try:
                    taker(record)
                except TrainingStopped as stopped:
                    stop = stop or stopped
            self._tell_events()
        if stop is not None:
            raise stop

    def flush(self) -> None:
        """Wait until the sinks have what they were given."""
        for sink in self._sinks:
            sink.flush()

    def close(self) -> None:
        """Close the sinks that were opened here."""
        for sink in self._own_sinks:
            sink.close()
