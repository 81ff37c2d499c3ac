"""A Lightning callback that probes every optimiser step.

::

    trainer = Trainer(callbacks=[FadiagCallback()])
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .._common.extras import require
from ..training.alarms import Alarm, Alarms
from ..training.sinks import LogSink
from . import Session, as_list

# The same library under two names, with classes of its own under each.
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _package() -> str:
    """Return the name under which the caller uses Lightning: imported, or else installed."""
    for name in _PACKAGES:
        if name in sys.modules:
            return name
    installed = (name for name in _PACKAGES if find_spec(name.partition(".")[0]) is not None)
    return next(installed, "pytorch_lightning")


_lightning = require(_package(), "FadiagCallback", extra="lightning")
_Callback: Any = _lightning.Callback


class FadiagCallback(_Callback):  # type: ignore[misc]  # known at run time only
    """Probe the step before each optimiser step, after its last micro-batch's backward pass.

    Figures go to the trainer's loggers and to ``sinks``. An alarm whose actions hold ``"stop"``
    sets ``trainer.should_stop``.

    A batch for which ``training_step`` returns None is counted and not recorded. Of several
    optimisers those are probed that hold parameters of the probed model. Of the backward passes
    between two of its steps those count that come after the last step of another optimiser, if
    there are any: the others were for that one.

    Args:
        taps: where to observe, by names of ``model``; None chooses.
        model: name of the submodule whose forward pass ``training_step`` calls, such as ``net``;
            by default the module itself where it has a ``forward``, else its only submodule with
            parameters.
        sinks: one or several of what :func:`~fadiag_fast.training.sinks.as_sink` takes.
        loggers: whether the trainer's loggers get the figures.
        alarms: what judges the steps; None warns by the default limits, False judges nothing.
        save_on_alarm: write ``fadiag_alarm_step=N.ckpt`` into the trainer's ``default_root_dir``
            after the step of an alarm.
        probe_options: further arguments of StepProbe.

    Raises:
        ValueError: the submodule cannot be told.
        MissingExtra: pytorch_lightning is not installed; at the import.
    """

    def __init__(
        self,
        taps: Any = None,
        *,
        model: str | None = None,
        sinks: Any = None,
        loggers: bool = True,
        alarms: Alarms | Literal[False] | None = None,
        save_on_alarm: bool = False,
        **probe_options: Any,
    ) -> None:
        self.taps, self.model, self.sinks = taps, model, as_list(sinks)
        self.loggers, self.alarms, self.save_on_alarm = loggers, alarms, save_on_alarm
        self.probe_options = probe_options
        self.session: Session | None = None
        self._alarms: list[Alarm] = []
        self._passes = 0  # backward passes since the last step of the probe

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        options = {"scaler": getattr(trainer.precision_plugin, "scaler", None)}
        options = {name: value for name, value in options.items() if value is not None}
        self._passes = 0
        self.session = Session(
            _called_module(pl_module, self.model),
            self.taps,
            sinks=self.sinks,
            loggers=[LogSink(one.log_metrics, owner=one) for one in trainer.loggers]
            if self.loggers
            else [],
            alarms=self.alarms,
            first_step=trainer.global_step,
            **{**options, **self.probe_options},
        )

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._passes += 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # Not on_after_backward: this comes once per optimiser step, however many batches it has.
        session, passes = self.session, self._passes
        if session is None:
            return
        if len(trainer.optimizers) > 1 and not session.is_trained_by(optimizer):
            session.probe.set_aside()
            return
        self._passes = 0
        if passes:
            self._alarms += session.step()
            self._stop(trainer)
        elif pl_module.automatic_optimization:
            session.probe.skip()  # training_step has returned None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        alarms, self._alarms = self._alarms, []
        if alarms and self.save_on_alarm:
            name = f"fadiag_alarm_step={alarms[0].step}.ckpt"
            trainer.save_checkpoint(Path(trainer.default_root_dir) / name)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _stop(self, trainer: Any) -> None:
        if self.session is not None and self.session.stopped is not None:
            trainer.should_stop = True

    def _close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def __getstate__(self) -> dict[str, Any]:
        # Lightning copies callbacks; a session belongs to one training.
        return {**self.__dict__, "session": None}


def _called_module(pl_module: nn.Module, name: str | None) -> nn.Module:
    if name is not None:
        return pl_module.get_submodule(name)
    # Compared by name: the module's class may come from the other of the two packages.
    if type(pl_module).forward.__qualname__ != "LightningModule.forward":
        return pl_module
    with_parameters = {
        child: module
        for child, module in pl_module.named_children()
        if next(module.parameters(), None) is not None
    }
    if len(with_parameters) != 1:
        raise ValueError(
            f"FadiagCallback: {type(pl_module).__name__}: expected a forward method or one "
            f"submodule with parameters, got {', '.join(with_parameters) or 'none'}; name the one "
            f"that training_step calls: FadiagCallback(model='…')"
        )
    return next(iter(with_parameters.values()))
