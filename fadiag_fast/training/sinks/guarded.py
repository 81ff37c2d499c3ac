"""Keep a sink that raises or blocks from harming the training: a thread and a queue for each."""

from __future__ import annotations

import logging
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..._common.warn import user_level
from ..alarms import Alarms, Event, TrainingStopped
from ..records import StepRecord
from .base import Each, RecordSink, Sink, SinkWarning, if_it_has, sink_name
from .jsonlines import JsonLines
from .trackers import as_sink

_log = logging.getLogger("fadiag_fast.training")


def files_of(sink: Any) -> list[JsonLines]:
    """Return the files among what a sink hands its records to."""
    if isinstance(sink, GuardedSink):
        return files_of(sink._queue.sink)
    if isinstance(sink, Each):
        return [file for one in sink.sinks for file in files_of(one)]
    return [sink] if isinstance(sink, JsonLines) else []


class Forward:
    """Hand an alarm's events, as they come, to the sinks that take events.

    Args:
        alarms: whose; None for nobody's.
        sinks: made by :func:`guard`.
    """

    def __init__(self, alarms: Alarms | None, sinks: Sequence[GuardedSink]) -> None:
        self._alarms, self._sinks = alarms, sinks
        self._told = 0 if alarms is None else len(alarms.events)

    def __call__(self) -> None:
        if self._alarms is None or len(self._alarms.events) == self._told:
            return
        events, self._told = self._alarms.events[self._told :], len(self._alarms.events)
        for event in events:
            for sink in self._sinks:
                sink.event(event)


class _Queue:
    """What a guard's thread works on; apart from the guard, so that the thread keeps none alive."""

    def __init__(self, sink: Any, size: int) -> None:
        self.sink, self.size = sink, size
        self.items: deque[tuple[str, Any]] = deque()
        self.changed = threading.Condition()
        self.busy = self.closing = False
        self.error: BaseException | None = None
        self.stop: TrainingStopped | None = None
        self.failed_at: int | None = None
        self.missed = self.dropped = 0

    def work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.items or self.closing)
                if not self.items:
                    return
                method, item = self.items.popleft()
                self.busy = True
            try:
                self.hand_on(method, item)
            finally:
                with self.changed:
                    self.busy = False
                    self.changed.notify_all()

    def hand_on(self, method: str, item: Any) -> None:
        if self.error is not None:
            self.miss(method)
            return
        try:
            if method == "record":
                self.sink(item)
            elif method == "event":
                if_it_has(self.sink, "event", item)
            else:
                if_it_has(self.sink, "flush")
        except TrainingStopped as stop:
            # It is meant for the training's thread, which raises it with the next record.
            self.stop = stop
        except Exception as error:
            if method == "record":
                self.failed_at = item.step
            self.error = error
            self.miss(method)

    def miss(self, method: str) -> None:
        with self.changed:  # the training's thread counts too
            self.missed += method == "record"


class GuardedSink(Sink):
    """Keep a sink from harming the training; made by :func:`guard`.

    Attributes:
        missed: records that the sink did not take since it raised.
        dropped: records that were dropped because the sink was too slow.
        error: what the sink raised; None while it works.
    """

    def __init__(
        self, sink: RecordSink, *, queue_size: int = 1024, timeout: float = 10.0, threaded: bool
    ) -> None:
        if queue_size < 1:
            raise ValueError(f"guard: queue_size: expected at least 1, got {queue_size}")
        if not timeout >= 0:
            raise ValueError(f"guard: timeout: expected seconds, at least 0, got {timeout}")
        self._queue = _Queue(sink, queue_size)
        self._title = repr(sink) if isinstance(sink, Sink) else sink_name(sink)
        self._timeout, self._threaded = timeout, threaded
        self._thread: threading.Thread | None = None
        self._warned_error = self._warned_slow = self._closed = False
        self._finish: Any = None

    @property
    def synchronous(self) -> bool:
        return not self._threaded

    @property
    def missed(self) -> int:
        return self._queue.missed

    @property
    def dropped(self) -> int:
        return self._queue.dropped

    @property
    def error(self) -> BaseException | None:
        return self._queue.error

    def __call__(self, record: StepRecord) -> None:
        self._put("record", record)

    def event(self, event: Event) -> None:
        """Hand on an alarm or an all clear, in its place among the records."""
        self._put("event", event)

    def _put(self, method: str, item: Any) -> None:
        queue = self._queue
        if self._closed:
            # A record after the end is lost, and counted.
            queue.miss(method)
            return
        if not self._threaded or queue.error is not None:
            queue.hand_on(method, item)
        else:
            self._start()
            with queue.changed:
                while len(queue.items) >= queue.size:
                    queue.dropped += queue.items.popleft()[0] == "record"
                queue.items.append((method, item))
                queue.changed.notify_all()
        self._warn()
        if queue.stop is not None:
            stop, queue.stop = queue.stop, None
            raise stop

    def _start(self) -> None:
        # A fork takes no thread along.
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(
                target=self._queue.work, name="fadiag sink", daemon=True
            )
            self._thread.start()
            if self._finish is not None:
                self._finish.detach()
            # At the exit of the process daemon threads end where they are: wait before that.
            self._finish = weakref.finalize(
                self, _wait_at_exit, os.getpid(), self._queue, self._timeout
            )

    def _warn(self) -> None:
        queue = self._queue
        if queue.error is not None and not self._warned_error:
            self._warned_error = True
            where = "" if queue.failed_at is None else f" at step {queue.failed_at}"
            error = f"{type(queue.error).__name__}: {queue.error}"
            _warn(
                f"sink {self._title}: it raised{where} and is switched off, training goes on: "
                f"{error}"
            )
        if queue.dropped and not self._warned_slow:
            self._warned_slow = True
            _warn(
                f"sink {self._title}: it is slower than the training; of the {queue.size} records "
                f"that wait for it the oldest are dropped"
            )

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until the sink has all records, and flush it.

        Args:
            timeout: seconds to wait; by default the guard's.

        Returns:
            Whether it has them all; False too for a sink that was switched off.
        """
        queue, done = self._queue, True
        if queue.error is None and not self._closed:
            if self._thread is not None:
                with queue.changed:
                    queue.items.append(("flush", None))
                    queue.changed.notify_all()
                done = _wait(queue, self._timeout if timeout is None else timeout)
            else:
                queue.hand_on("flush", None)
        self._warn()
        return done and queue.error is None

    def close(self) -> None:
        """Flush, close the sink and say how many records it has missed; may be called twice."""
        if self._closed:
            return
        done = self.flush()
        queue, self._closed = self._queue, True
        with queue.changed:
            queue.closing = True
            queue.changed.notify_all()
        if self._finish is not None:
            self._finish.detach()
        waiting = sum(method == "record" for method, _ in queue.items) + queue.busy
        if done or queue.error is not None:
            # One that still blocks in another thread is not touched from this one.
            try:
                if_it_has(queue.sink, "close")
            except Exception as error:
                _warn(f"sink {self._title}: close() raised {type(error).__name__}: {error}")
        lost = [
            f"{count} {what}"
            for count, what in (
                (queue.missed, "since it was switched off"),
                (queue.dropped, "because it was slow"),
                (0 if done or queue.error else waiting, "that it did not take in time"),
            )
            if count
        ]
        if lost:
            _log.warning("sink %s: it has missed records: %s", self._title, ", ".join(lost))

    def __repr__(self) -> str:
        return f"guard({self._title})"


def _wait(queue: _Queue, timeout: float) -> bool:
    with queue.changed:
        return queue.changed.wait_for(lambda: not queue.items and not queue.busy, timeout)


def _wait_at_exit(process: int, queue: _Queue, timeout: float) -> None:
    if os.getpid() == process:  # a fork has the finalizer, but not the thread
        _wait(queue, timeout)


def _warn(text: str) -> None:
    warnings.warn(text, SinkWarning, stacklevel=user_level())


def guard(
    sink: Any,
    *,
    threaded: bool | None = None,
    queue_size: int = 1024,
    timeout: float = 10.0,
    prefix: str = "fadiag/",
) -> GuardedSink:
    """Return a sink that neither raises into the training nor holds it up.

    One that raises is switched off after one warning; ``close()`` logs how many records it missed.
    Records wait in a bounded queue for a thread of the sink's own; where it is full the oldest are
    dropped and counted, after one warning. :class:`~fadiag_fast.training.alarms.TrainingStopped`
    is let through.

    Args:
        sink: anything that :func:`as_sink` takes.
        threaded: whether the sink gets a thread; by default unless it appends to a list, or says
            ``synchronous = True`` as :class:`~fadiag_fast.training.alarms.Alarms` does.
        queue_size: records that may wait.
        timeout: seconds that ``flush`` and ``close`` wait, and the end of the process.
        prefix: of the figures' names.

    Raises:
        TypeError, ValueError: as :func:`as_sink`; a queue or a timeout out of its range.
    """
    if isinstance(sink, GuardedSink):
        return sink
    made = as_sink(sink, prefix)
    if threaded is None:
        # Appending to a list takes less than waking a thread.
        appends = isinstance(getattr(made, "__self__", None), list | deque)
        threaded = not (appends or getattr(made, "synchronous", False))
    return GuardedSink(made, queue_size=queue_size, timeout=timeout, threaded=threaded)
