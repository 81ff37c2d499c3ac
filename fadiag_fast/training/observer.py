"""What hooks talk to: the passes that begin and end, and the micro-batches that they bring.

From a hook to a micro-batch: :meth:`Observer.begin` opens a :class:`.Pass`, hooks show it states,
gradients open an :class:`.Observation`, and when the backward pass is over that is reduced to
:class:`.StepFigures`. What is compiled comes through gradient taps, straight to figures.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._common.warn import user_level
from ..capture import Output
from ..capture.tracing import exporting, recorded, transformed
from .compiled_plan import LogitsPlace
from .compiled_taps import GradientTaps, Job
from .figures import TRAINS, Parts, StepFigures
from .forward_pass import Observation, Pass, Settings
from .gradients import Gradients
from .tensor_parallel import is_dtensor

NOT_COMPILED = (
    "StepProbe: expected a network under tensor parallelism to run eagerly, got states of compiled "
    "modules; compile what lies between the tapped modules, or name taps outside of compiled ones"
)

_log = logging.getLogger("fadiag_fast.training")
_observers: weakref.WeakSet[Observer] = weakref.WeakSet()


class Installer(Protocol):
    """Who puts the hooks in place, before the first pass and where a later one shows more."""

    prepared: bool

    def prepare_from_call(self, args: Any, kwargs: Any) -> None: ...

    def look_again(self, args: Any, kwargs: Any) -> bool: ...

    def called_more(self, current: Pass, given: tuple[Any, Any] | None) -> None: ...

    def compiled_states(self) -> frozenset[int]: ...


class SeenLoop:
    """What has been seen of a training loop; apart from the probe, which may be gone before it."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.backward_passes = 0
        self.begun = False

    def count(self) -> None:
        self.backward_passes += not self.begun

    def tell(self) -> None:
        """Warn at the end if ``step()`` was never called."""
        never = not self.begun and self.backward_passes > 1
        self.begun = True
        if never and os.getpid() == self.process:
            warnings.warn(
                f"StepProbe: step() was never called, and nothing is recorded of "
                f"{self.backward_passes} backward passes: call probe.step() after the backward "
                f"pass, before the optimiser's step",
                RuntimeWarning,
                stacklevel=2,
            )


class Observer:
    """The passes of one model, as hooks show them.

    Args:
        model: the probed one, unwrapped.
        output: which part of a structured output counts as logits.
        installer: chooses the taps in the first pass.

    Attributes:
        active: False once nothing is observed any more; in compiled code this is a constant.
        wanted: whether the schedule wants the step at hand.
        step: its number.
        current: the pass under way.
        backward_of: the pass whose backward may run parts of it again.
        observations: of backward passes since the last reduction.
        eager, compiled: the micro-batches that hooks and gradient taps have brought.
        aside: micro-batches that count only if no others come.
        seconds: of the host, spent in hooks.
        autocast: name of the dtype of autocast in the pass that was reduced last.
        compiled_autocast: the dtype of autocast in compiled code.
        was_transformed: whether a pass was inside of a function transform.
        passed_unwanted: whether a pass came that the schedule does not want.
        looks_again: whether the next pass chooses the taps again.
        settings, slots, looped: of the taps; see :class:`.Installation`.
        in_compiled: states whose module is compiled on its own; None until the first pass.
    """

    def __init__(self, model: nn.Module, output: Output | None, installer: Installer) -> None:
        self.model = model
        self.output = output
        self.installer = installer
        self.active = True
        self.wanted = False
        self.step = 0
        self.loop = SeenLoop()
        self.gradients = Gradients(model, self.forget_cleared)
        self.current: Pass | None = None
        self.backward_of: Pass | None = None
        self.observations: list[Observation] = []
        self.eager = Parts()
        self.compiled = Parts(self.loop.count)
        self.aside: list[StepFigures] = []
        self.seconds = 0.0
        self.autocast: str | None = None
        self.compiled_autocast: torch.dtype | None = None
        self.was_transformed = False
        self.passed_unwanted = False
        self.looks_again = False
        self.settings: Settings | None = None
        self.slots: GradientTaps | None = None
        self.logits_place = LogitsPlace()
        self.looped: Sequence[tuple[int, int]] = ()  # numbers of hooks, and their known calls
        self.in_compiled: frozenset[int] | None = None
        self._given: tuple[Any, Any] | None = None  # to the pass under way
        self._has_gpu = torch.cuda.is_available()
        _observers.add(self)

    # ---- in the forward pass

    def observes(self) -> bool:
        """Return whether passes are observed now; compiled code has the answer, with guards."""
        if exporting():
            return False
        return self.active and self.model.training and torch.is_grad_enabled()

    def awaits_first_pass(self) -> bool:
        """Return whether the taps are chosen in the pass at hand."""
        return not self.installer.prepared and self.observes()

    def through(self, jobs: tuple[Job, ...], state: Tensor) -> Tensor:
        """Send a tensor through its gradient taps inside of a compiled graph."""
        if not state.requires_grad:
            return state
        if is_dtensor(state):
            raise RuntimeError(NOT_COMPILED)
        assert self.slots is not None
        for job in jobs:
            samples = 0
            if job.slot == len(self.slots.labels):
                place = self.logits_place
                samples = state.shape[place.dim] // place.per_sample
            state = self.slots.through(job, state, samples)
        return state

    def begin(self, args: Any, kwargs: Any, autocast: torch.dtype | None) -> None:
        """Open a pass, where the model runs to be trained."""
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed model runs again
        self.current = None
        if not (torch.is_grad_enabled() and self.model.training) or recorded():
            return
        if transformed():
            self.was_transformed = True
            return
        if not self.wanted and not (self._has_gpu and torch.cuda.is_current_stream_capturing()):
            self.passed_unwanted = True
            return
        if not self.installer.prepared:
            self.installer.prepare_from_call(args, kwargs)
        elif self.looks_again and not (self.eager or self.compiled or self.observations):
            self.looks_again = False
            if not self.installer.look_again(args, kwargs):
                return
        self._given = (args, kwargs)
        if self.in_compiled is None:
            self.in_compiled = self.installer.compiled_states()
        assert self.settings is not None
        self.reduce_finished()
        self.current = Pass(self.settings, self._opened, name_of(autocast))

    def end(self) -> Pass | None:
        """Close the pass under way, and return it."""
        current, self.current = self.current, None
        if current is not None and (
            current.again
            or any(current.calls.get(number, 0) > known for number, known in self.looped)
        ):
            self.installer.called_more(current, self._given)
        self._given = None
        return current

    # ---- in the backward pass

    def _opened(self, observation: Observation) -> None:
        self.loop.count()
        if observation.purpose == TRAINS:
            self.gradients.begins()
        self.observations.append(observation)
        self.backward_of = observation.of

    def forget_cleared(self) -> None:
        """Leave out backward passes whose gradients were cleared before an optimiser used them.

        As after an exception that was caught, or when the loss of another network is gone.
        """
        count = len(self.observations) + len(self.eager) + len(self.compiled)
        if count:
            _log.info(
                "%s: step %d: left out %d earlier forward passes, whose gradients were cleared",
                type(self.model).__name__,
                self.step,
                count,
            )
        self.forget()

    # ---- between passes

    def reduce_finished(self) -> None:
        """Reduce the micro-batches whose backward passes have ended; drop broken ones."""
        observations, self.observations = self.observations, []
        for observation in observations:
            if not observation.finished:
                observation.forget()
                continue
            self.take_over(observation.of)
            figures = observation.figures()
            if figures is not None:
                self.eager.add(figures)
        if self.slots is not None:
            self.slots.forget()
        self.backward_of = None

    def take_over(self, of: Pass) -> None:
        """Take a pass's time and its dtype of autocast as the step's."""
        self.autocast = of.autocast
        self.seconds += of.seconds
        of.seconds = 0.0

    def only_observation(self) -> Observation | None:
        """Return the one micro-batch of a step, where there is no other and it is whole."""
        if len(self.observations) != 1 or self.eager or self.compiled or not self.wanted:
            return None
        return self.observations[0] if self.observations[0].finished else None

    def take_parts(self) -> tuple[list[StepFigures], int]:
        """Return the micro-batches of a step, and how many of them were compiled.

        Of eager ones those that a step prefers: what trains before what only looks at gradients.
        """
        best = max((part.purpose for part in self.eager), default=0)
        eager = [part for part in self.eager if part.purpose == best]
        compiled = list(self.compiled)
        if compiled and not eager:
            self.autocast = name_of(self.compiled_autocast)
        if eager and len(eager) == len(compiled):  # some modules are compiled, others not
            return [joined(a, b) for a, b in zip(eager, compiled, strict=True)], len(compiled)
        return eager + compiled, len(compiled)

    def forget(self) -> None:
        """Let go of all micro-batches since the last step."""
        for observation in self.observations:
            observation.forget()
        self.observations = []
        self.clear()

    def clear(self) -> None:
        """Let go of the micro-batches that are reduced."""
        self.eager.clear()
        self.compiled.clear()

    def explain_nothing(self) -> str:
        """Return why a step has brought no micro-batch, as the end of a message; "" if unknown."""
        compiled = any(
            hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
            for module in self.model.modules()
        )
        if not self.model.training:
            return "; the model is in eval mode, whose passes are not looked at: call model.train()"
        if self.was_transformed:
            return (
                "; passes inside of function transforms (torch.func.grad, vmap and others) are not "
                "looked at: differentiate with backward() or torch.autograd.grad"
            )
        if self.gradients.ignored:
            return (
                "; a backward pass that adds to no parameter's .grad, as torch.autograd.grad for "
                "inputs does, is not counted: differentiate the loss with backward()"
            )
        if not self.installer.prepared:
            return "; the model was not called in training mode with gradients enabled"
        if self.slots is not None and self.slots.refusal and (compiled or _has_compiled()):
            return f"; of a compiled model, {self.slots.refusal}"
        if compiled or _has_compiled():
            return (
                "; if the model is compiled, the probe must be built before its first compiled call"
            )
        return ""


@contextmanager
def others_suspended(model: nn.Module) -> Iterator[None]:
    """Keep other probes' passes out of a look at a model that they share modules with."""
    mine = set(model.modules())
    others = [o for o in list(_observers) if o.current and not mine.isdisjoint(o.model.modules())]
    under_way = [(observer, observer.current) for observer in others]
    for observer in others:
        observer.current = None
    try:
        yield
    finally:
        for observer, current in under_way:
            if observer.current is None:
                observer.current = current


class CompiledFlaws:
    """What a compiled backward pass cannot show, told once.

    Args:
        observer: whose gradient taps.
        remark: is told why a pass has no logits that gains could be relative to.
    """

    def __init__(self, observer: Observer, remark: Any) -> None:
        self._observer = observer
        self._remark = remark
        self._told = False
        self._passes = 0

    def count(self, passes: int) -> None:
        """Note compiled passes of a step; stop where they cannot be shown from the first.

        Raises:
            RuntimeError: the first ones were several for one backward pass.
        """
        if passes:
            self._tell(first=not self._passes)
            self._passes += passes

    def tell(self) -> None:
        """Warn of what a step without an output error may come from; waits for the device."""
        if self._passes:
            self._tell(first=False)

    def _tell(self, first: bool) -> None:
        slots = self._observer.slots
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if slots is None or captured or self._told:
            return
        if slots.summed_passes():
            self._told = True
            reason = (
                "StepProbe: expected one forward pass of the compiled model for each backward "
                "pass, got several, of which only the sum arrives"
            )
            advice = "give the model both batches in one call, or probe it without torch.compile"
            if first:
                raise RuntimeError(f"{reason}; {advice}")
            warnings.warn(
                f"{reason}: figures of such steps are NaN; {advice}",
                RuntimeWarning,
                stacklevel=user_level(),
            )
        elif slots.divided_logits():
            self._told = True
            self._remark(
                "StepProbe: output: expected a compiled forward to make the logits of all samples "
                "in each call, got calls for some of the samples each, which cannot be told apart"
            )


def name_of(dtype: torch.dtype | None) -> str | None:
    """Return a dtype's name without ``torch.``."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _has_compiled() -> bool:
    """Return whether the compiler has run in this process; often it is imported and no more."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"])


def joined(eager: StepFigures, compiled: StepFigures) -> StepFigures:
    """Return one micro-batch that was seen in part by hooks, in part by gradient taps."""
    seen = eager.norms
    return StepFigures(
        torch.where(torch.isnan(seen), compiled.norms[..., : seen.shape[2]], seen),
        [a if a is not None else b for a, b in zip(eager.means, compiled.means, strict=True)],
        eager.missing & compiled.missing,
        eager.samples,
        rms=_of_both(eager, compiled),
        has_error=eager.has_error or compiled.has_error,
    )


def _of_both(eager: StepFigures, compiled: StepFigures) -> Tensor:
    seen = eager.root_mean_squares()
    other = compiled.root_mean_squares()[..., : seen.shape[1]]
    return torch.where(torch.isnan(seen), other, seen)
