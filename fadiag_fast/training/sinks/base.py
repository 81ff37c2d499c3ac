"""What a sink is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..alarms import Event
from ..records import StepRecord


class RecordSink(Protocol):
    """What takes records."""

    def __call__(self, record: StepRecord) -> Any: ...


class SinkWarning(UserWarning):
    """Category of the warnings about sinks."""


class Sink:
    """Base of the sinks here: context managers with ``flush`` and ``close``, which do nothing."""

    def __call__(self, record: StepRecord) -> None:
        raise NotImplementedError

    def flush(self) -> Any:
        """Hand on what is held back."""

    def close(self) -> None:
        """Flush, and let go of what was opened; may be called twice."""
        self.flush()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Each(Sink):
    """Hand a record to several sinks."""

    def __init__(self, sinks: Sequence[RecordSink]) -> None:
        self.sinks = tuple(sinks)

    def __call__(self, record: StepRecord) -> None:
        for sink in self.sinks:
            sink(record)

    def event(self, event: Event) -> None:
        for sink in self.sinks:
            if_it_has(sink, "event", event)

    def flush(self) -> None:
        for sink in self.sinks:
            if_it_has(sink, "flush")

    def close(self) -> None:
        for sink in self.sinks:
            if_it_has(sink, "close")


def sink_name(target: Any) -> str:
    found = getattr(target, "__qualname__", None) or type(target).__qualname__
    return str(found)


def if_it_has(sink: Any, method: str, *arguments: Any) -> None:
    found = getattr(sink, method, None)
    if callable(found):
        found(*arguments)
