"""Where step records go: JSON lines, loggers, trackers, or a function of your own.

A sink is called with each :class:`~fadiag_fast.training.records.StepRecord`; it may have
``flush()`` and ``close()``, and ``event(event)`` for alarms. :func:`as_sink` makes one of what
people have, and :func:`guard` keeps a sink that raises or blocks from harming the training.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import threading
import time
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from ..checkpoints.opening import check_regular
from .alarms import Alarms, Event, TrainingStopped, event_from_dict, user_level
from .distributed import Share
from .records import FIGURES, StepRecord

FORMAT_VERSION = 2
# The header's key; a line without it and without "event" is a record.
_HEADER = "fadiag_steps"
# What MLflow allows in a metric's name beside letters and digits: _ - . space / and, not on
# Windows, a colon.
_NOT_MLFLOW = re.compile(r"[^\w\-. /]")

_log = logging.getLogger("fadiag_fast.training")


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


class JsonLines(Sink):
    """Write one line of JSON per record, flushed line by line: a reader may follow the file.

    A header line precedes the first record of each session: the format's version, the names of the
    layers and whatever else the session's records have in common, which they leave out. A last line
    that a crash has cut is left as it is, on a line of its own.

    Where ranks share their figures the first of them writes the file, and the others nothing. Where
    they hold different layers, as the stages of a pipeline do, the first rank of each stage writes
    a file of its own beside it: ``steps.rank2.jsonl``.

    Args:
        path: the file; its folder is made if need be.
        append: add to a file that exists, else replace it.
        every_rank: every rank writes; all but the first one to files of their own as above.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], append: bool = True, *, every_rank: bool = False
    ) -> None:
        self.path = Path(path)
        self.share = Share()
        self._append, self._every_rank = append, every_rank
        self.path.parent.mkdir(parents=True, exist_ok=True)
        open(self.path, "ab").close()  # says at once what is wrong with it
        self._file: IO[str] | None = None
        self._is_closed = self._is_silent = False
        self._lock = threading.Lock()  # alarms may be written from the training's thread
        self._session = uuid.uuid4().hex[:8]
        self._common: dict[str, Any] = {}
        self._told: set[Event] = set()

    def __call__(self, record: StepRecord) -> None:
        with self._lock:
            file = self._opened()
            if file is None:
                return
            values = record.to_mapping()
            if not self._common:
                self._write_header(file, values)
            line = {
                name: value
                for name, value in values.items()
                if name in FIGURES or value != self._common[name]
            }
            self._write(file, json.dumps({"session": self._session, **line}))

    def _write_header(self, file: IO[str], values: Mapping[str, Any]) -> None:
        from .. import __version__

        self._common = {name: value for name, value in values.items() if name not in FIGURES}
        header = {
            _HEADER: FORMAT_VERSION,
            "fadiag_fast": __version__,
            "time": time.time(),
            "session": self._session,
            "alarms": self.share.judged,
            **self._common,
        }
        self._write(file, json.dumps(header))

    def event(self, event: Event) -> None:
        """Write an alarm or an all clear among the records, once."""
        with self._lock:
            file = self._opened()
            if file is None or event in self._told:
                return
            self._told.add(event)
            values = {"session": self._session, **event.to_dict()}
            self._write(file, json.dumps(values, ensure_ascii=False))

    def _opened(self) -> IO[str] | None:
        """Return the file, opened now that this rank's place is known; None on a silent rank."""
        if self._is_closed:
            raise ValueError(f"JsonLines: {self.path}: expected an open file, got a closed one")
        if self._file is None and not self._is_silent:
            path = self.share.file(self.path, self._every_rank)
            self._is_silent = path is None
            if path is not None:
                cut = self._append and _ends_within_a_line(path)
                self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
                if not self._append:
                    self._file.truncate(0)
                if cut:
                    self._file.write("\n")
        return self._file

    def _write(self, file: IO[str], line: str) -> None:
        file.write(line + "\n")
        file.flush()

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        self._is_closed = True
        if self._file is not None:
            self._file.close()
            self._file = None

    def __repr__(self) -> str:
        return f"JsonLines({str(self.path)!r})"


def files_of(sink: Any) -> list[JsonLines]:
    """Return the files among what a sink hands its records to."""
    if isinstance(sink, GuardedSink):
        return files_of(sink._queue.sink)
    if isinstance(sink, _Each):
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


def _ends_within_a_line(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class StepLog:
    """What a file of JSON lines holds.

    Attributes:
        path: the file.
        records: in order of step. Where a session went on from an earlier step than the one before
            it had reached, its records take the place of the old ones.
        events: alarms and all clears that the run itself has written, of the same steps.
        sessions: how often a run began to write.
        superseded: records that a later session has replaced.
        cut: whether the last line is not whole, as while it is being written or after a crash.
        damaged: numbers, from 1, of the lines that could not be read, the cut one left out.
    """

    path: Path
    records: tuple[StepRecord, ...]
    events: tuple[Event, ...] = ()
    sessions: int = 1
    superseded: int = 0
    cut: bool = False
    damaged: tuple[int, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a reader should know of the file, in sentences."""
        found = []
        if self.superseded:
            found.append(
                f"{self.superseded} records of earlier sessions are replaced by later ones"
            )
        if self.cut:
            found.append("the last line is cut off: it is being written, or the run has crashed")
        if self.damaged:
            lines = ", ".join(map(str, self.damaged[:5]))
            more = f" and {len(self.damaged) - 5} more" if len(self.damaged) > 5 else ""
            found.append(f"could not be read: line {lines}{more}")
        return found


def read_jsonlines(path: str | os.PathLike[str]) -> StepLog:
    """Read what :class:`JsonLines` has written, also while it is being written.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds lines, but none of them is of this format, or a later version wrote it;
            or it is no regular file.
    """
    path = Path(path)
    check_regular(path, ValueError, f"{path}")
    lines = path.read_bytes().split(b"\n")
    last_is_whole = lines[-1] == b""
    entries: list[tuple[int, StepRecord | Event]] = []  # with the session's number
    reader, cut, understood = LineReader(path), False, False
    damaged: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry = reader.read(line)
        if entry is None:
            if number == len(lines) and not last_is_whole:
                cut = True
            else:
                damaged.append(number)
            continue
        understood = True
        if not isinstance(entry, dict):
            entries.append((reader.session, entry))
    if not understood and damaged:
        raise ValueError(f"{path}: expected JSON lines of step records, got none among its lines")
    records, events, superseded = _latest_sessions(entries)
    return StepLog(
        path,
        tuple(records),
        tuple(events),
        max(reader.sessions, 1),
        superseded,
        cut,
        tuple(damaged),
    )


class LineReader:
    """Read the lines of a file of step records one after another.

    A session's header says what its records have in common. Each line names its session, for two
    that write into one file at a time take turns.

    Attributes:
        sessions: headers read so far.
        session: the number, from 1, of the session that the last line belongs to; 0 without header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sessions = self.session = 0
        self._known: dict[str, tuple[int, dict[str, Any]]] = {}

    def read(self, line: bytes) -> StepRecord | Event | dict[str, Any] | None:
        """Return what a line holds; a header as a dictionary; None for a line that is damaged.

        Raises:
            ValueError: it is the header of a later version.
        """
        try:
            values = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            return None
        if not isinstance(values, dict):
            return None
        if _HEADER in values:
            return self._header(values)
        name = values.pop("session", None)
        # The lines of version 1 are whole, and belong to the header before them.
        whole = (self.sessions, dict[str, Any]())
        number, common = whole if name is None else self._known.get(str(name), (-1, {}))
        if number < 0:
            return None
        try:
            event = "event" in values
            found = event_from_dict(values) if event else StepRecord.from_mapping(common | values)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None
        self.session = number
        return found

    def _header(self, values: dict[str, Any]) -> dict[str, Any]:
        version = values[_HEADER]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"{self.path}: expected step records of version {FORMAT_VERSION} or earlier, got "
                f"version {version}"
            )
        self.sessions = self.session = self.sessions + 1
        if version > 1:
            self._known[str(values.get("session"))] = self.session, values
        return values


def _latest_sessions(
    entries: Sequence[tuple[int, StepRecord | Event]],
) -> tuple[list[StepRecord], list[Event], int]:
    """Return records and events without those that a later session has replaced, and how many.

    Each by its own step: an alarm is of an earlier one than the record behind which it stands. What
    a session writes once a later one has begun is replaced too.
    """
    latest = 0
    records: list[tuple[int, StepRecord]] = []
    events: list[tuple[int, Event]] = []
    superseded = 0
    for session, entry in entries:
        if session < latest:
            superseded += isinstance(entry, StepRecord)
            continue
        latest = session
        if not isinstance(entry, StepRecord):
            events.append((session, entry))
            continue
        while records and records[-1][0] < session and records[-1][1].step >= entry.step:
            records.pop()
            superseded += 1
        while events and events[-1][0] < session and events[-1][1].step >= entry.step:
            events.pop()
        records.append((session, entry))
    return [record for _, record in records], [event for _, event in events], superseded


class LogSink(Sink):
    """Call ``log(metrics, step=step)`` for each record; metrics are flat names and numbers.

    Args:
        log: the function.
        prefix: of the names.
        owner: what is kept open for the function's sake; its ``flush()`` is called, if it has one.
    """

    def __init__(
        self, log: Callable[..., Any], prefix: str = "fadiag/", owner: object = None
    ) -> None:
        self.log, self.prefix, self.owner = log, prefix, owner
        self._by_keyword = _takes_keyword_step(log)

    def __call__(self, record: StepRecord) -> None:
        metrics = self.metrics(record)
        if self._by_keyword:
            self.log(metrics, step=record.step)
        else:
            self.log(metrics, record.step)

    def metrics(self, record: StepRecord) -> dict[str, float]:
        return record.metrics(self.prefix)

    def flush(self) -> None:
        flush = getattr(self.owner, "flush", None)
        if callable(flush):
            flush()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_name(self.log)})"


class MlflowSink(LogSink):
    """The same for MLflow, with names that it takes: other signs become ``_``."""

    def metrics(self, record: StepRecord) -> dict[str, float]:
        found = record.metrics(self.prefix)
        return {_NOT_MLFLOW.sub("_", name): value for name, value in found.items()}


class TensorBoardSink(Sink):
    """Write each figure as a scalar with ``writer.add_scalar``."""

    def __init__(self, writer: Any, prefix: str = "fadiag/") -> None:
        self.writer, self.prefix = writer, prefix

    def __call__(self, record: StepRecord) -> None:
        for name, value in record.metrics(self.prefix).items():
            self.writer.add_scalar(name, value, record.step)

    def flush(self) -> None:
        self.writer.flush()

    def __repr__(self) -> str:
        return f"TensorBoardSink({_name(self.writer)})"


class WandbSink(Sink):
    """Log to a W&B run, by the figures' own axis ``fadiag/step``.

    W&B drops what is logged for a step before its current one, and records come some steps late. So
    no step is given: the figures join the row that is being filled, and a row is ended only where
    nobody else has ended it since the record before.
    """

    def __init__(self, run: Any, prefix: str = "fadiag/") -> None:
        self.run, self.prefix = run, prefix
        self._open_row: object = None
        run.define_metric(f"{prefix}step", hidden=True)
        run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")

    def __call__(self, record: StepRecord) -> None:
        if self._open_row is not None and self.run.step == self._open_row:
            self.run.log({}, commit=True)
        metrics = {**record.metrics(self.prefix), f"{self.prefix}step": record.step}
        self.run.log(metrics, commit=False)
        self._open_row = self.run.step

    def __repr__(self) -> str:
        return f"WandbSink({_name(self.run)})"


class LoggingSink(Sink):
    """Write a line per record to a logger of the standard library.

    Args:
        logger: where to.
        level: of the lines.
    """

    def __init__(self, logger: Any, level: int = logging.INFO) -> None:
        self.logger, self.level = logger, level

    def __call__(self, record: StepRecord) -> None:
        if not record.layers:
            return
        self.logger.log(
            self.level,
            "step %d: ‖h_L‖ %.3g, growth %.3g, ‖g_L‖ %.3g, credit gain %.3g%s",
            record.step,
            record.hidden_norms[-1],
            record.growth,
            record.grad_norms[-1],
            record.credit_gains[-1],
            ", skipped" if record.skipped else "",
        )

    def __repr__(self) -> str:
        return f"LoggingSink({self.logger.name!r})"


class _Each(Sink):
    """Hand a record to several sinks."""

    def __init__(self, sinks: Sequence[RecordSink]) -> None:
        self.sinks = tuple(sinks)

    def __call__(self, record: StepRecord) -> None:
        for sink in self.sinks:
            sink(record)

    def event(self, event: Event) -> None:
        for sink in self.sinks:
            _if_it_has(sink, "event", event)

    def flush(self) -> None:
        for sink in self.sinks:
            _if_it_has(sink, "flush")

    def close(self) -> None:
        for sink in self.sinks:
            _if_it_has(sink, "close")


def as_sink(target: Any, prefix: str = "fadiag/") -> RecordSink:
    """Return a sink for what people have, recognised by what it can do.

    Args:
        target: a sink (it is returned as it is); a path, for :class:`JsonLines`; a SummaryWriter
            (``add_scalar``); a W&B run or the module ``wandb`` with a run under way; the module
            ``mlflow`` or a Lightning logger (``log_metrics``); a trackio run, the module
            ``trackio``, an Accelerator or anything else with ``log(metrics, step)``; a logger of
            ``logging``; a function of ``(metrics, step)`` or of ``(record)``; or a list of these.
        prefix: of the figures' names.

    Raises:
        TypeError: none of these.
        ValueError: an empty list, or ``wandb`` without a run.
    """
    if isinstance(target, Sink):
        return target
    if isinstance(target, (str, os.PathLike)):
        return JsonLines(target)
    if isinstance(target, (list, tuple)):
        if not target:
            raise ValueError(
                "sink: expected at least one in a list, got none; to collect records, give "
                "records.append"
            )
        return _Each([as_sink(one, prefix) for one in target])
    if target is None or isinstance(target, type):
        raise TypeError(_expected(target))
    if isinstance(target, (logging.Logger, logging.LoggerAdapter)):
        return LoggingSink(target)
    if callable(getattr(target, "add_scalar", None)):
        return TensorBoardSink(target, prefix)
    package = _package(target)
    if package == "wandb":
        return _wandb(target, prefix)
    if callable(getattr(target, "log_metrics", None)):
        kind = MlflowSink if package == "mlflow" else LogSink
        return kind(target.log_metrics, prefix, target)
    if package == "mlflow" and callable(getattr(target, "log_metric", None)):
        raise TypeError(
            f"sink: expected the module mlflow, whose log_metrics goes to the active run, got "
            f"{type(target).__name__}"
        )
    if not inspect.ismodule(target) and getattr(target, "synchronous", False) and callable(target):
        return target  # type: ignore[no-any-return]  # Alarms, and what is made like it
    log = getattr(target, "log", None)
    if callable(log) and not inspect.isfunction(target):
        return LogSink(log, prefix, target)
    if callable(target):
        owner = getattr(target, "__self__", None)
        if owner is not None and not inspect.ismodule(owner) and _package(owner) == "wandb":
            return _wandb(owner, prefix)
        return LogSink(target, prefix) if _takes_step(target) else target
    raise TypeError(_expected(target))


def _expected(target: object) -> str:
    return (
        "sink: expected a path, a SummaryWriter, a logger, a run or module with log(metrics, step) "
        f"or log_metrics(metrics, step), or a function of a record, got {target!r}"
    )


def _wandb(target: Any, prefix: str) -> Sink:
    run = target.run if inspect.ismodule(target) else target
    if run is None:
        raise ValueError("sink: wandb: expected a run under way, got none: call wandb.init first")
    return WandbSink(run, prefix)


def _package(target: Any) -> str:
    name = target.__name__ if inspect.ismodule(target) else type(target).__module__
    return str(name).partition(".")[0]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C, without a signature
        return {}


def _takes_keyword_step(function: Callable[..., Any]) -> bool:
    parameters = _parameters(function)
    step = parameters.get("step")
    if step is not None and step.kind is not inspect.Parameter.POSITIONAL_ONLY:
        return True
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return any_name and not _needs_two(parameters)


def _needs_two(parameters: Mapping[str, inspect.Parameter]) -> bool:
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    needed = [
        p for p in parameters.values() if p.kind in positional and p.default is inspect._empty
    ]
    return len(needed) >= 2


def _takes_step(function: Callable[..., Any]) -> bool:
    """Say whether a function is a ``log(metrics, step)`` and not one of a record."""
    parameters = _parameters(function)
    return "step" in parameters or "global_step" in parameters or _needs_two(parameters)


def _name(target: Any) -> str:
    found = getattr(target, "__qualname__", None) or type(target).__qualname__
    return str(found)


def _if_it_has(sink: Any, method: str, *arguments: Any) -> None:
    found = getattr(sink, method, None)
    if callable(found):
        found(*arguments)


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
                _if_it_has(self.sink, "event", item)
            else:
                _if_it_has(self.sink, "flush")
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
        self._title = repr(sink) if isinstance(sink, Sink) else _name(sink)
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
                _if_it_has(queue.sink, "close")
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
