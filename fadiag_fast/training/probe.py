"""Observe a training run from inside its own forward and backward passes.

Hooks on the tapped modules see states and, later, their gradients (:mod:`.observer`; inside
``torch.compile`` :mod:`.compiled_taps`). ``step()`` reduces them to one row of figures on the
device (:mod:`.rows`), which reaches the host through a ring some steps later, and every sink as a
:class:`~fadiag_fast.training.records.StepRecord` (:mod:`.delivery`). Nothing here waits for the
device.
"""

from __future__ import annotations

import atexit
import os
import time
import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..capture import Output, check_model
from ..capture.arguments import check_module
from ..capture.points import Select, Taps, unwrap
from ..capture.reduction import Reduction, SampleReduction, reduction_of
from .alarms import Alarms, TrainingStopped
from .delivery import Delivery
from .exchange import Share
from .figures import StepFigures
from .hooks import OfThisRun
from .installation import Installation
from .options import (
    DirectionLayers,
    DirectionOptions,
    Mode,
    ProbeOptions,
    check_first_step,
    names_of,
)
from .rank_merge import RankMerge
from .recorder import StepRecorder
from .schedule import Schedule, as_schedule

_alive: weakref.WeakSet[StepProbe] = weakref.WeakSet()


if hasattr(os, "register_at_fork"):
    # Pending records belong to the parent; a forked child must not flush them.
    os.register_at_fork(after_in_child=_alive.clear)


@atexit.register
def _flush_all() -> None:
    for probe in list(_alive):
        try:
            probe.flush()
        except TrainingStopped:
            pass  # it stops
        except Exception as error:  # the process ends: there is nobody to catch it
            warnings.warn(f"StepProbe: the last records are lost: {error}", stacklevel=1)


class StepProbe(OfThisRun):
    """Record hidden states and gradients of every training step, from the training's own passes.

    ::

        probe = StepProbe(model, sink=print)
        for x, y in batches:
            loss_of(model(x), y).backward()
            probe.step()  # before clipping and the optimiser's step
            optimizer.step()
            optimizer.zero_grad()
        probe.flush()

    There is no extra pass, no wait for the device, and the model computes exactly what it did.
    Passes without gradients and of a model in eval mode are not looked at; a pass without a
    backward pass leaves nothing behind.

    Args:
        model: any module, wrappers (DistributedDataParallel, ``torch.compile``) included. To be
            observed inside ``torch.compile`` the probe must be there before the first compiled
            call, and know its taps: from ``example``, or because it was given the compiled module.
        taps: where to observe, see :func:`fadiag_fast.capture.taps.find_taps`; None chooses.
        sink: where every :class:`~fadiag_fast.training.records.StepRecord` goes, in order, some
            steps after its own: a path for JSON lines (of ranks that share their figures the first
            one writes), a SummaryWriter, a W&B run, ``log(dict,
            step)``, a function of a record, and whatever else
            :func:`~fadiag_fast.training.sinks.as_sink` takes; or a list of such. Each works on a
            thread of its own; one that raises is switched off after one warning.
        alarms: judges the records on the training's thread; None warns by the default limits,
            False judges nothing. With the action ``"stop"``, ``step()`` raises TrainingStopped.
        schedule: which steps are recorded: ``"every"``, a whole number n for every n-th, ``"log"``,
            a share such as 0.01 of the time that the probe may take, or a
            :class:`~fadiag_fast.training.schedule.Schedule`.
        window: K, with how many earlier recorded steps a direction is compared; on CUDA at most
            2,814.
        decay: of the exponential average of directions.
        directions: whose directions are kept: of the ``"middle"`` state, which the protocol's (c)
            reads, of ``"all"``, or of ``"none"``; or :class:`.DirectionOptions`, which hold window,
            decay and sketch as well. Kept are K + 1 vectors of D float32 each.
        sketch: keep so many numbers of each direction instead of D: a count sketch, with which a
            cosine c has the standard error √((1 + c²) / sketch).
        reduction: what one sample's state is, see
            :class:`~fadiag_fast.capture.reduction.SampleReduction`.
        output: which part of a structured output counts as logits.
        batch_dim: the dimension of every state that counts samples.
        ring: how many recorded steps may be on their way from the device.
        example: an input batch (a tensor, a tuple of arguments or a dict of keywords) to find the
            taps with; otherwise the first training pass's own input is used. It costs one forward
            pass in eval mode that leaves no trace.
        scaler: the ``torch.amp.GradScaler`` in use: its factor is divided out of the figures. A
            record waits for the next ``step()``, to say whether the scaler skipped its own.
        loss_reduction: ``"mean"``, ``"sum"`` or any text: recorded beside the figures, which are
            of the loss as it is trained.
        first_step: optimiser steps done before, as after a checkpoint: records and schedule count
            from there, and a file of JSON lines goes on where the earlier session's checkpoint was.
        group: of ranks whose samples belong to one batch: None is all processes where
            ``torch.distributed`` is initialised, False none but this one. The gradients are
            taken to be averaged over the ranks, as DistributedDataParallel and ``fully_shard`` do;
            over the copies of the model under tensor parallelism.
        tensor_group: the ranks that hold one copy of the model together, a process group or a
            DeviceMesh: None finds them by parameters that are DTensors, False is none.
        sharded: names (or patterns, such as ``"blocks.*"``) of states whose plain tensors are each
            of these ranks' own part of the state, of its features or positions; ``"output"`` for
            the logits. What is a DTensor says so itself. Needs the reduction ``flatten``.
        samples: observe only the first so many samples of every pass, on each rank, and read only
            their share of the states; None observes all. Medians are then over these, and
            directions their mean.
        max_samples: of one rank in one step (compiled: in one pass); None takes the first one's.
        mode: ``"passing"`` reduces states as they pass, ``"together"`` keeps them until the step
            ends, ``"auto"`` keeps those that are small: 8 MiB for all of them.

    Raises:
        TapError: the hidden states cannot be found; at the first pass if there is no example.
        ValueError: an argument is out of its range.
        TypeError: ``sink`` or ``schedule`` has an unsupported type, or ``alarms`` is not an
            :class:`.Alarms`.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Select | None = None,
        *,
        sink: Any = None,
        alarms: Alarms | Literal[False] | None = None,
        schedule: str | int | float | Schedule = "every",
        window: int = 8,
        decay: float = 0.9,
        directions: DirectionLayers | DirectionOptions = "middle",
        sketch: int | None = None,
        reduction: Reduction | SampleReduction = "flatten",
        output: Output | None = None,
        batch_dim: int = 0,
        ring: int = 32,
        example: Any = None,
        scaler: Any = None,
        loss_reduction: str = "mean",
        first_step: int = 0,
        group: Any = None,
        tensor_group: Any = None,
        sharded: str | Sequence[str] = (),
        samples: int | None = None,
        max_samples: int | None = None,
        mode: Mode = "auto",
    ) -> None:
        check_first_step(first_step)
        chosen = (
            directions
            if isinstance(directions, DirectionOptions)
            else DirectionOptions(directions, window, decay, sketch)
        )
        options = self.options = ProbeOptions(
            select=taps,
            output=output,
            batch_dim=batch_dim,
            reduction=reduction_of(reduction),
            directions=chosen,
            mode=mode,
            samples=samples,
            max_samples=max_samples,
            ring=ring,
            scaler=scaler,
            loss_reduction=loss_reduction,
            group=group,
            tensor_group=tensor_group,
            sharded=names_of(sharded),
        )
        check_module(model, "StepProbe")
        self.model = unwrap(model)
        check_model(self.model)
        self.schedule = as_schedule(schedule)
        self._delivery = Delivery(sink, alarms, group)
        self._installation = Installation(self.model, model, options, owner=self)
        observer = self._observer = self._installation.observer
        observer.step = first_step
        observer.wanted = self._schedule_wants()
        weakref.finalize(self, observer.loop.tell)  # at the exit of the process at the latest
        is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        merge = RankMerge(self.model, is_wrapped, options, self.schedule, self.share)
        self._recorder = StepRecorder(options, merge, self._delivery, self._installation)
        self._step_began = time.perf_counter()
        self._step_was_wanted = False
        self._has_gpu = torch.cuda.is_available()
        _alive.add(self)
        self._installation.prepare(example, self._recorder)

    @property
    def taps(self) -> Taps:
        """Where the network is observed; known from the first pass on, or from the example."""
        if self._installation.taps is None:
            raise RuntimeError("StepProbe.taps: expected an example, or one training pass first")
        return self._installation.taps

    @property
    def alarms(self) -> Alarms | None:
        """What judges the records; None for nothing."""
        return self._delivery.alarms

    @property
    def share(self) -> Share:
        """Whose figures this rank's records are, and so which rank writes them into a file."""
        return self._delivery.share

    def describe(self) -> str:
        """Return what is observed, in one line: the first step logs it, and each record has it."""
        if self._installation.taps is None:
            return "nothing observed yet: the taps are chosen in the first training pass"
        return self._installation.taps.observed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {self.describe()})"

    def _schedule_wants(self) -> bool:
        return self._observer.active and bool(self.schedule.wants(self._observer.step))

    # ---- after the backward pass

    def step(self) -> None:
        """Record the step whose backward passes have just ended; hand out what has arrived.

        Call it after the backward passes of all micro-batches, before gradients are clipped and
        before the optimiser's step. Inside of a CUDA graph's capture it becomes part of the graph;
        call it after each replay too.

        Raises:
            TrainingStopped: an alarm of an earlier step stops the training.
            RuntimeError: no backward pass reached an observed state since the last step.
            ValueError, TapError: states or logits do not have a row for each sample.
        """
        if not self._observer.active:  # the probe is removed
            return
        self._observer.loop.begun = True
        # As torch.no_grad does, at a seventh of its time.
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            if self._has_gpu and torch.cuda.is_current_stream_capturing():
                self._capture_step()
            else:
                self._end_step()
        finally:
            torch._C._set_grad_enabled(enabled)

    def _end_step(self) -> None:
        began = time.perf_counter()
        observer, recorder = self._observer, self._recorder
        step = observer.step
        parts: list[StepFigures] = []
        replayed = False
        observer.current = None
        try:
            recorder.resolve()
            replayed = recorder.reduce_by_graph(step)
            parts = recorder.take_parts()
            if not replayed:
                parts = parts or observer.aside
        finally:
            self._forget_parts()
            self._advance()
        wanted = self._step_was_wanted
        outside = replayed or observer.passed_unwanted
        observer.passed_unwanted = False
        # Nothing but a replay of the training's graph leaves no trace on the host.
        if not parts and not outside and recorder.record_replay(step if wanted else None):
            recorder.ready()
            return
        if not parts and wanted and not replayed:
            raise RuntimeError(self._nothing_arrived(step))
        if parts and wanted:
            recorder.record(parts, step)
        recorder.ready()
        now = time.perf_counter()
        if wanted:
            self.schedule.note(step, observer.seconds + now - began, now - self._step_began)
            # The cost that was just noted may change the answer.
            observer.wanted = self._schedule_wants()
        observer.gradients.ignored = False
        observer.seconds = 0.0
        self._step_began = now

    def _capture_step(self) -> None:
        observer, recorder = self._observer, self._recorder
        observer.current = None
        try:
            parts = recorder.take_parts() or observer.aside
        finally:
            self._forget_parts()
        observer.passed_unwanted = False
        if not parts:
            raise RuntimeError(self._nothing_arrived(observer.step))
        recorder.capture(parts)

    def _forget_parts(self) -> None:
        self._observer.aside = []
        self._observer.observations = []
        self._observer.clear()

    def _advance(self) -> None:
        observer = self._observer
        self._step_was_wanted = observer.wanted
        observer.step += 1
        observer.wanted = self._schedule_wants()

    def _nothing_arrived(self, step: int) -> str:
        return (
            f"StepProbe.step: step {step}: expected a backward pass through the model since the "
            f"last step, got none{self._observer.explain_nothing()}"
        )

    # ---- at the user's word

    @torch.no_grad()
    def flush(self) -> None:
        """Wait for all figures under way, and until the sinks have them.

        Raises:
            TrainingStopped: an alarm that came with them stops the training.
        """
        try:
            self._recorder.resolve()
            self._recorder.settle()
            self._recorder.drain()
        finally:
            self._delivery.flush()

    @torch.no_grad()
    def set_aside(self) -> None:
        """Leave the micro-batches so far out of the next step, if others come before it.

        For a loop with several optimisers: a backward pass of another network's loss through this
        one belongs to the step of the other's optimiser, after which this is called.
        """
        self._observer.current = None
        parts = self._recorder.take_parts()
        if parts:
            self._observer.aside = parts
        self._observer.clear()

    def skip(self) -> None:
        """Count an optimiser step of which nothing is recorded, as of a batch that is left out."""
        self.discard()
        self._advance()

    def discard(self) -> None:
        """Forget the micro-batches since the last step, as when their gradients are thrown away.

        A backward pass that raised is left out by itself; this is for a step that is given up after
        its backward pass.
        """
        self._observer.current = None
        self._observer.aside = []
        self._observer.forget()

    def remove(self) -> None:
        """Flush, take all hooks away, and close the sinks that were opened here.

        The model is as it was before.

        Raises:
            TrainingStopped: as :meth:`flush` does.
        """
        try:
            self.flush()
        finally:
            self._installation.remove()
            self.discard()
            self._observer.loop.tell()
            _alive.discard(self)
            self._delivery.close()

    def __enter__(self) -> StepProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
