"""Probe every optimiser step of a loop that uses accelerate.

::

    probe = prepare_probe(accelerator, model)  # after accelerator.prepare
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model(x), y))
            probe.step()
            optimizer.step()
            optimizer.zero_grad()
    probe.close()
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ..training.alarms import Alarm, Alarms
from . import Session, as_list


class AcceleratedProbe(Session):
    """A probe that passes over incomplete gradients; see :func:`prepare_probe`."""

    def __init__(self, accelerator: Any, model: nn.Module, taps: Any = None, **options: Any):
        self.accelerator = accelerator
        super().__init__(model, taps, **options)

    def step(self) -> list[Alarm]:
        """Probe a step, after its backward pass; nothing between micro-batches.

        Returns:
            The alarms that have come since the last step.

        Raises:
            TrainingStopped: an alarm whose actions hold ``"stop"`` has fired.
        """
        if not self.accelerator.sync_gradients:
            return []
        alarms = super().step()
        if self.stopped is not None:
            raise self.stopped
        return alarms


def prepare_probe(
    accelerator: Any,
    model: nn.Module,
    taps: Any = None,
    *,
    sinks: Any = None,
    log: bool | None = None,
    alarms: Alarms | Literal[False] | None = None,
    first_step: int = 0,
    **probe_options: Any,
) -> AcceleratedProbe:
    """Return a probe for a model that ``accelerator.prepare`` has returned.

    Its ``step()`` belongs after ``accelerator.backward``, inside ``accelerator.accumulate``:
    between micro-batches it does nothing. ``close()`` ends it, or a ``with`` block does.

    Args:
        accelerator: the Accelerator; its gradient scaler's factor is removed.
        model: as the loop calls it.
        taps: where to observe; None chooses.
        sinks: one or several of what :func:`~fadiag_fast.training.sinks.as_sink` takes.
        log: whether the accelerator's trackers get the figures, by ``accelerator.log``; by default
            where it has trackers.
        alarms: what judges the steps; None warns by the default limits, False judges nothing. The
            action ``"stop"`` makes ``step()`` raise
            :class:`~fadiag_fast.training.alarms.TrainingStopped`.
        first_step: optimiser steps done before, as after a checkpoint.
        probe_options: further arguments of StepProbe.

    Raises:
        TypeError: ``accelerator`` is none.
    """
    for name in ("sync_gradients", "log", "trackers"):
        if not hasattr(accelerator, name):
            raise TypeError(
                f"prepare_probe: accelerator: expected an accelerate.Accelerator, got "
                f"{type(accelerator).__name__}"
            )
    if getattr(accelerator, "scaler", None) is not None:
        probe_options = {"scaler": accelerator.scaler, **probe_options}
    logs = bool(accelerator.trackers) if log is None else log
    return AcceleratedProbe(
        accelerator,
        model,
        taps,
        sinks=as_list(sinks),
        loggers=[accelerator] if logs else [],
        alarms=alarms,
        first_step=first_step,
        **probe_options,
    )
