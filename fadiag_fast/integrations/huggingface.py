"""A callback of transformers' Trainer that probes every optimiser step.

::

    trainer = Trainer(model, …)
    FadiagTrainerCallback().attach(trainer)
"""

from __future__ import annotations

from typing import Any, Literal

from .._common.extras import require
from ..training.alarms import Alarm, Alarms
from . import Session, as_list

_transformers = require("transformers", "FadiagTrainerCallback", extra="")
_TrainerCallback: Any = _transformers.TrainerCallback


class FadiagTrainerCallback(_TrainerCallback):  # type: ignore[misc]  # known at run time only
    """Probe the step before each optimiser step, after its last micro-batch's backward pass.

    Whenever the trainer logs, the figures of the latest record join what it reports, with the
    record's own step as ``fadiag/step``; ``sinks`` get every record. The trainer hands its log from
    callback to callback: :meth:`attach` puts this one first, so that all of them report the
    figures; given as ``Trainer(callbacks=[…])`` it comes after the reporting ones, and the figures
    are in ``trainer.state.log_history`` and the progress bar only.

    An alarm whose actions hold ``"stop"`` sets ``control.should_training_stop``.

    Args:
        taps: where to observe; None chooses.
        sinks: one or several of what :func:`~fadiag_fast.training.sinks.as_sink` takes.
        report: whether the figures join the trainer's log.
        alarms: what judges the steps; None warns by the default limits, False judges nothing.
        save_on_alarm: have the trainer write a checkpoint after the step of an alarm.
        probe_options: further arguments of StepProbe.

    Raises:
        MissingExtra: transformers is not installed; at the import.
    """

    def __init__(
        self,
        taps: Any = None,
        *,
        sinks: Any = None,
        report: bool = True,
        alarms: Alarms | Literal[False] | None = None,
        save_on_alarm: bool = False,
        **probe_options: Any,
    ) -> None:
        self.taps, self.sinks, self.report = taps, as_list(sinks), report
        self.alarms, self.save_on_alarm = alarms, save_on_alarm
        self.probe_options = probe_options
        self.session: Session | None = None
        self._alarms: list[Alarm] = []
        self._reported: int | None = None

    def attach(self, trainer: Any) -> FadiagTrainerCallback:
        """Add the callback to a trainer, before all others."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        return self

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._close()  # of a training that an exception has ended
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        options = {} if scaler is None else {"scaler": scaler}
        self.session = Session(
            model,
            self.taps,
            sinks=self.sinks,
            alarms=self.alarms,
            first_step=state.global_step,
            **{**options, **self.probe_options},
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.session is not None:
            self._alarms += self.session.step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        alarms, self._alarms = self._alarms, []
        if alarms and self.save_on_alarm:
            control.should_save = True
        if self.session is not None and self.session.stopped is not None:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        record = None if self.session is None else self.session.latest
        # An evaluation logs too; a record is reported once.
        if logs is None or record is None or not self.report or record.step == self._reported:
            return
        self._reported = record.step
        metrics = {**record.metrics(), "fadiag/step": record.step}
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        # A session belongs to one training.
        return {**self.__dict__, "session": None}

    def _close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.close()
