"""Sinks for loggers and experiment trackers."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..records import StepRecord
from .base import Each, RecordSink, Sink, sink_name
from .jsonlines import JsonLines

# What MLflow allows in a metric's name beside letters and digits: _ - . space / and, not on
# Windows, a colon.
_NOT_MLFLOW = re.compile(r"[^\w\-. /]")


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
        return f"{type(self).__name__}({sink_name(self.log)})"


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
        return f"TensorBoardSink({sink_name(self.writer)})"


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
        return f"WandbSink({sink_name(self.run)})"


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


def as_sink(target: Any, prefix: str = "fadiag/") -> RecordSink:
    """Adapt a path, logger, tracker or callable to a sink.

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
        return Each([as_sink(one, prefix) for one in target])
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
    """Return whether a function is a ``log(metrics, step)`` and not one of a record."""
    parameters = _parameters(function)
    return "step" in parameters or "global_step" in parameters or _needs_two(parameters)
