"""Where step records go: JSON lines, loggers, trackers, or a function of your own.

A sink is called with each :class:`~fadiag_fast.training.records.StepRecord`; it may have
``flush()`` and ``close()``, and ``event(event)`` for alarms. :func:`as_sink` makes one of what
people have, and :func:`guard` keeps a sink that raises or blocks from harming the training.
"""

from __future__ import annotations

from .base import SinkWarning
from .guarded import Forward, GuardedSink, files_of, guard
from .jsonlines import JsonLines, LineReader, StepLog, read_jsonlines
from .trackers import LogSink, WandbSink, as_sink

__all__ = [
    "Forward",
    "GuardedSink",
    "JsonLines",
    "LineReader",
    "LogSink",
    "SinkWarning",
    "StepLog",
    "WandbSink",
    "as_sink",
    "files_of",
    "guard",
    "read_jsonlines",
]
