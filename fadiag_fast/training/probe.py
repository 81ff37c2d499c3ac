"""Observe a training run from inside its own forward and backward passes.

Hooks on the tapped modules see states and, later, their gradients (:mod:`.passes`; inside
``torch.compile`` :mod:`.slots`). ``step()`` reduces them to one row of figures on the device, which
reaches the host through a ring (:mod:`.ring`) some steps later, and every sink as a
:class:`~fadiag_fast.training.records.StepRecord`. Nothing here waits for the device.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import logging
import math
import os
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from operator import truediv
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import ops
from ..arguments import check_how, check_module
from ..capture import Output, Probe, check_model, output_of, sample_rows, untouched
from ..protocol import OUTPUT, middle_layer
from ..statistics import Reduction, SampleReduction
from ..taps import Select, TapError, Taps, find_taps, is_sum, sighting_at, unwrap
from ..tracing import Trace, clean_name, exporting, recorded, transformed
from .alarms import Alarms, TrainingStopped, user_level
from .directions import Directions
from .distributed import Exchange, Pending, Share, all_present, default_group, fingerprint
from .hooks import (
    EndHook,
    Hook,
    InputHook,
    LogitsHook,
    OfThisRun,
    OutputHook,
    PrepareHook,
    RootHook,
    autocast_dtype,
)
from .passes import (
    TRAINS,
    Figures,
    Gradients,
    Observation,
    Parts,
    Pass,
    Settings,
    by_sample,
    merged,
    root_of,
)
from .records import StepRecord
from .replay import STEPS_BEFORE, Replay, like_of
from .ring import Ring
from .schedule import Budget, Schedule, as_schedule
from .sharded import TensorRanks, find_tensor_ranks, is_dtensor, like_whole
from .sinks import Forward, files_of, guard
from .slots import Job, Slots

Mode = Literal["auto", "passing", "together"]

# All states and gradients of a pass together: small beside any training that has larger ones.
_KEPT_BYTES = 8 * 2**20

# Seconds that a rank waits in its first step for the others'. Ranks whose backward passes wait for
# each other's are close together there.
_SYNCHRONOUS_PATIENCE, _PATIENCE = 2.0, 10.0

_NOT_COMPILED = (
    "StepProbe: expected a network under tensor parallelism to run eagerly, got states of compiled "
    "modules; compile what lies between the tapped modules, or name taps outside of compiled ones"
)

_log = logging.getLogger("fadiag_fast.training")

_alive: weakref.WeakSet[StepProbe] = weakref.WeakSet()


if hasattr(os, "register_at_fork"):
    # What is under way is the training's; a child that ends has nothing to wait for.
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


class _Steps:
    """What has been seen of a training loop; apart from the probe, which may be gone before it."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.backward_passes = 0
        self.begun = False

    def count(self) -> None:
        self.backward_passes += not self.begun

    def tell(self) -> None:
        """Say at the end that ``step()`` was never called, if so."""
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


class _Meta(NamedTuple):
    """What the host knows of a row on its way.

    Attributes:
        sizes: features of each state; empty where the row has the root mean squares.
        reference: what credit gains are relative to.
    """

    step: int
    sizes: tuple[int, ...]
    reference: str
    samples: int | None
    micro_batches: int
    autocast: str | None
    missing: tuple[int, ...]
    scaled: bool
    world_size: int = 1


def _name_of(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _has_compiled() -> bool:
    """Say whether the compiler has run in this process; often it is imported and no more."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters["frames"])


@functools.lru_cache
def _roots(sizes: tuple[int, ...]) -> tuple[float, ...]:
    """Return what turns norms of so many features into root mean squares; NaN where unknown."""
    return tuple(map(root_of, sizes))


class _Scaling:
    """What a gradient scaler does in one step, on the device.

    Args:
        scaler: of torch's kind.
        overflowed: whether a gradient that was seen is not finite.
        unscaled: flags of what the scaler has met so far: none before ``unscale_`` or ``step``.

    Attributes:
        scale: the factor of this step, float64.
        skipped: whether the step is skipped, as far as is known.
        known: whether the scaler has said so since; until then what was seen must do.
    """

    def __init__(self, scaler: Any, overflowed: Tensor, unscaled: Sequence[Tensor]) -> None:
        self._scaler = scaler
        device = overflowed.device
        self.skipped, self.known = overflowed, torch.zeros_like(overflowed)
        for flag in unscaled:
            found = (flag.to(device, non_blocking=True) != 0).reshape(())
            self.skipped = self.skipped | found
        self._before = self._state(device)
        self.scale = torch.ones((), dtype=torch.float64, device=device)
        if self._before is not None:
            self.scale = self._before[0]
        else:  # a scaler that is disabled skips nothing
            self.skipped, self.known = torch.zeros_like(overflowed), torch.ones_like(overflowed)

    def _state(self, device: torch.device) -> Tensor | None:
        """Return the scaler's factor and for how many steps it has not changed, ``[2]``."""
        scale = getattr(self._scaler, "_scale", None)
        if scale is None:
            return None
        streak = getattr(self._scaler, "_growth_tracker", None)
        both = [scale, torch.full_like(scale, -1) if streak is None else streak]
        return torch.stack([t.detach().reshape(()).double() for t in both]).to(
            device, non_blocking=True
        )

    def resolve(self) -> None:
        """Read from the scaler, after its ``update``, what it did.

        Its factor then is smaller and the streak 0 if it met something that is not finite in any
        gradient of a parameter; else the streak is longer, or it was rewarded with a larger factor.
        """
        now = None if self._before is None else self._state(self.skipped.device)
        if now is None or self._before is None:
            return
        before, self._before = self._before, None
        new = now[1] == 0
        skipped = new & (now[0] < before[0])
        self.known = skipped | (new & (now[0] > before[0])) | (now[1] == before[1] + 1)
        self.skipped = torch.where(self.known, skipped, self.skipped)

    def overflowed(self, more: Tensor) -> None:
        """Note what other ranks have seen: what one of them met, all of them skip."""
        self.skipped = torch.where(self.known, self.skipped, self.skipped | more)

    def figures(self) -> Tensor:
        """Return factor and whether the step is skipped, ``[2]`` float64."""
        return torch.stack([self.scale, self.skipped.double()])


def _as_input(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the arguments of a call as one input."""
    if not kwargs:
        return args
    if not args:
        return dict(kwargs)
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    found = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update(found.pop(name, {}))
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            if found.get(name):
                raise TapError(
                    f"{type(model).__name__}: {name}: expected arguments that can be given by "
                    f"name, to find the taps with; give example="
                )
            found.pop(name, None)
    return found


def _without_batch(x: Any) -> torch.Size | None:
    """Return the shape of an input whose floating tensors have one dimension; None of others."""
    tensors = [one for one in tree_leaves(x) if isinstance(one, Tensor)]
    shapes = [one.shape for one in tensors if one.is_floating_point()]
    alike = bool(shapes) and len(shapes) == len(tensors) and {len(s) for s in shapes} == {1}
    return shapes[0] if alike else None


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
        taps: where to observe, see :func:`fadiag_fast.taps.find_taps`; None chooses.
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
            reads, of ``"all"``, or of ``"none"``. Kept are K + 1 vectors of D float32 each.
        sketch: keep so many numbers of each direction instead of D: a count sketch, with which a
            cosine c has the standard error √((1 + c²) / sketch).
        reduction: what one sample's state is, see
            :class:`~fadiag_fast.statistics.SampleReduction`.
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
        TypeError: a sink or schedule is none, or alarms are not.
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
        directions: Literal["middle", "all", "none"] = "middle",
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
        for name, value in (
            ("window", window),
            ("ring", ring),
            ("sketch", 1 if sketch is None else sketch),
            ("samples", 1 if samples is None else samples),
            ("max_samples", 1 if max_samples is None else max_samples),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"StepProbe: {name}: expected a whole number from 1, got {value}")
        if isinstance(first_step, bool) or not isinstance(first_step, int) or first_step < 0:
            raise ValueError(
                f"StepProbe: first_step: expected a whole number from 0, got {first_step!r}"
            )
        check_how(None, batch_dim, "StepProbe")
        if not isinstance(decay, int | float) or not 0.0 <= decay < 1.0:
            raise ValueError(f"StepProbe: decay: expected a number in [0, 1), got {decay!r}")
        if directions not in ("middle", "all", "none"):
            raise ValueError(
                f"StepProbe: directions: expected 'middle', 'all' or 'none', got {directions!r}"
            )
        if mode not in ("auto", "passing", "together"):
            raise ValueError(
                f"StepProbe: mode: expected 'auto', 'passing' or 'together', got {mode!r}"
            )
        check_module(model, "StepProbe")
        self.model = unwrap(model)
        check_model(self.model)
        self.select = taps
        self.output = output
        self.batch_dim = batch_dim
        self.window = window
        self.decay = decay
        self.sketch = sketch
        self.scaler = scaler
        self.loss_reduction = loss_reduction
        self.group = group
        self.tensor_group = tensor_group
        self.sharded = (sharded,) if isinstance(sharded, str) else tuple(sharded)
        self.samples = samples
        self.max_samples = max_samples
        self.mode = mode
        self.reduction = (
            reduction if isinstance(reduction, SampleReduction) else SampleReduction(reduction)
        )
        if self.sharded and self.reduction.kind != "flatten":
            raise ValueError(
                f"StepProbe: sharded: expected the reduction flatten, got {self.reduction.kind}: "
                f"plain tensors do not say whether they are parts along features or positions"
            )
        self.schedule = as_schedule(schedule)
        self._which_directions = directions
        self._ring_rows = ring
        given = [] if sink is None else sink if isinstance(sink, list | tuple) else [sink]
        self._sinks = [guard(one) for one in given]
        self._own_sinks = [
            made for made, one in zip(self._sinks, given, strict=True) if made is not one
        ]
        if not (alarms is None or alarms is False or isinstance(alarms, Alarms)):
            raise TypeError(f"StepProbe: alarms: expected Alarms, None or False, got {alarms!r}")
        self.alarms = None if alarms is False else alarms or Alarms()
        judges = [] if self.alarms is None else [self.alarms]
        self._takers: list[Callable[[StepRecord], Any]] = [*self._sinks, *judges]
        self._tell_events = Forward(self.alarms, self._sinks)
        self._share = Share(group, judged=self.alarms is not None)
        self._share.look()
        for file in (file for one in self._sinks for file in files_of(one)):
            file.share = self._share
        self._taps: Taps | None = None
        self._n = -1
        self._prepared = self._preparing_now = False
        self._active = True  # read by compiled code: turning it off compiles the hooks away
        self._step = first_step
        self._wanted = self._schedule_wants()
        self._step_began = time.perf_counter()
        self._current: Pass | None = None  # under way
        self._backward_of: Pass | None = None  # whose backward pass may run parts of it again
        self._observations: list[Observation] = []
        self._aside: list[Figures] = []
        self._was_transformed = False  # whether a pass was inside of a function transform
        self._steps = _Steps()
        weakref.finalize(self, self._steps.tell)  # at the exit of the process at the latest
        self._gradients = Gradients(self.model, self._forget_cleared)
        self._parts = Parts()
        self._slot_parts = Parts(self._steps.count)
        self._seconds = 0.0
        self._autocast: str | None = None
        self._compiled_autocast: torch.dtype | None = None
        self._said_why = False
        self._told_flaws = False  # of what is compiled
        self._compiled_passes = 0
        self._observed = ""
        # Modules with hooks, by name; those that are called several times with the known number.
        self._hooked: list[tuple[str, nn.Module]] = []
        self._looped: list[tuple[Hook, int]] = []
        self._last_lack: tuple[frozenset[int], bool] = (frozenset(), False)
        self._looks_again = False
        self._given: tuple[Any, Any] | None = None  # to the pass under way
        self._looks_with: tuple[Any, Any] | None = None
        self._example = (example,) if isinstance(example, Tensor) else example
        self._said_calls: set[str] = set()
        self._calls_looked_at: dict[str, int] | None = None
        self._chain_starts: tuple[int, ...] = ()
        self._slots: Slots | None = None
        self._settings: Settings | None = None
        self._tensor_ranks: TensorRanks | None = None
        self._directions: Directions | None = None
        self._ring: Ring | None = None
        self._exchange: Exchange | None = None
        self._is_alone: bool | None = None  # whether other ranks of the group record nothing
        self._is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        self._pending: tuple[Pending, _Meta, _Scaling | None] | None = None
        self._unresolved: _Scaling | None = None
        self._held: tuple[_Meta, _Scaling] | None = None
        self._graphed: _Meta | None = None
        # What graphs write to, for as long as the probe lives: they outlive a change of shapes.
        self._graph_memory: list[Any] = []
        self._passed_unwanted = False  # a pass of the model that the schedule does not want
        self._replay: Replay | None = None
        self._replay_refused = False
        self._replayed_starts = 0
        self._like: list[Any] = []
        self._alike = 0
        self._has_gpu = torch.cuda.is_available()
        self._in_compiled: frozenset[int] | None = None
        self._handles: list[Any] = []
        self._preparing: list[Any] = []
        _alive.add(self)
        if example is not None:
            self._prepare(self._example)
        else:
            hook = PrepareHook(self, -1)
            self._preparing.append(hook.before(model))

    # ---- before the first pass

    @property
    def taps(self) -> Taps:
        """Where the network is observed; known from the first pass on, or from the example."""
        if self._taps is None:
            raise RuntimeError("StepProbe.taps: expected an example, or one training pass first")
        return self._taps

    def describe(self) -> str:
        """Return what is observed, in one line: the first step logs it, and each record has it."""
        if self._taps is None:
            return "nothing observed yet: the taps are chosen in the first training pass"
        return self._taps.observed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {self.describe()})"

    def _awaits_first_pass(self) -> bool:
        return not self._prepared and self._observes()

    def _prepare_from_call(self, args: Any, kwargs: Any) -> None:
        if self._awaits_first_pass() and not self._preparing_now:
            self._prepare(_as_input(self.model, args, kwargs))

    def _prepare(self, x: Any) -> None:
        self._preparing_now = True
        # Another probe's pass may be under way, in which this look at the model has no part.
        mine = set(self.model.modules())
        others = [p for p in list(_alive) if p._current and not mine.isdisjoint(p.model.modules())]
        under_way = [(probe, probe._current) for probe in others]
        for probe in others:
            probe._current = None
        try:
            # Before the model runs: fully_shard then shows its parameters as they are kept.
            self._find_tensor_ranks()
            checker = Probe(self.model, batch_dim=self.batch_dim, output=self.output)
            with untouched(self.model):
                found, seen = find_taps(
                    self.model,
                    x,
                    self.select,
                    lambda state: checker.counts_samples(x, state),
                    batch_dim=self.batch_dim,
                    several=self.reduction.kind != "token",
                )
                if found.hands_out:
                    raise TapError(
                        f"{type(self.model).__name__}: expected states that pass through modules "
                        f"in training, got a forward that hands them out under "
                        f"return_hidden=True; name the taps"
                    )
                self._install(found, seen)
        except BaseException as error:
            # The next pass is the first one then.
            for handle in self._handles:
                handle.remove()
            self._handles = []
            shape = _without_batch(x)
            if isinstance(error, TapError) and shape is not None:
                raise TapError(
                    f"{error} The input has shape {list(shape)}: if it is one sample without a "
                    f"batch dimension, call the model with x[None], of shape {[1, *shape]}."
                ) from error
            raise
        finally:
            self._preparing_now = False
            for probe, current in under_way:
                if probe._current is None:
                    probe._current = current
        for handle in self._preparing:
            handle.remove()
        self._preparing = []
        self._prepared = True

    def _install(self, found: Taps, seen: Trace) -> None:
        points = found.points
        n = len(points)
        if n == 0:
            raise TapError(f"{type(self.model).__name__}: expected at least one state, got none")
        self._taps, self._n = found, n
        self._observed = found.observed
        _log.info("%s: %s", type(self.model).__name__, self._observed)
        self._chain_starts = found.chain_starts
        layers: tuple[int, ...] = {
            "middle": (middle_layer(n),),
            "all": tuple(range(n)),
            "none": (),
        }[self._which_directions]
        limits = {"passing": -1, "together": 2**62, "auto": _KEPT_BYTES // (2 * (n + 1))}
        sightings = [sighting_at(seen, point) for point in points]
        if all(s is not None and s.tensor.dim() == 1 for s in sightings):
            assert sightings[0] is not None
            raise TapError(
                f"{type(self.model).__name__}: {found.labels[0]}: expected a state with a batch "
                f"dimension and features, got shape {list(sightings[0].tensor.shape)}."
            )
        self._settings = Settings(
            type(self.model).__name__,
            found.labels,
            self.reduction,
            self.batch_dim,
            layers,
            self._gradients,
            limits[self.mode],
            any(s is not None and s.tensor.is_complex() for s in sightings),
            {l for l, s in enumerate(sightings) if s is not None and s.overwritten},
            samples=self.samples,
            remark=self._without_output,
        )
        self._settings.tensor_ranks = self._tensor_ranks
        names = (*found.labels, "output")
        for pattern in self.sharded:
            if not any(fnmatch(name, pattern) for name in names):
                raise TapError(
                    f"StepProbe: sharded: expected names of observed states ({', '.join(names)}), "
                    f"got {pattern!r}"
                )
        if layers:
            self._directions = Directions(len(layers), self.window, self.sketch)
        jobs, refusals = self._jobs(found, seen)
        modules: dict[str, nn.Module] = {
            clean_name(name): module for name, module in self.model.named_modules()
        }
        logits_at = self._logits_module(seen)
        hooks: dict[tuple[str, str], Hook] = {}

        def hook_at(name: str, at: str) -> Hook:
            key = (name, at)
            if key not in hooks:
                kind = OutputHook if at == "output" else InputHook
                hooks[key] = kind(self, len(hooks))
            return hooks[key]

        for l, point in enumerate(points):
            hook = hook_at(point.module, point.at)
            hook.taps += ((point.call, l),)
        for (name, at), more in jobs.items():
            hook_at(name, at).jobs += tuple(more)
            if at == "output":
                own = [job.slot for job in more if job.state and points[job.slot].at == "input"]
                hook_at(name, at).stand_ins += tuple(own)
        logits_hook = LogitsHook(self, len(hooks))
        logits_hook.is_inner = logits_at != ""
        calls: dict[str, int] = {}
        for call in seen.calls:
            calls[call.name] = calls.get(call.name, 0) + 1
        root = self.model
        self._handles.append(RootHook(self, -1).before(root))
        for (name, at), hook in hooks.items():
            hook.several = calls.get(name, 0) > 1
            module = modules[name]
            self._hooked.append((name, module))
            if hook.several:
                self._looped.append((hook, calls[name]))
            hook.name = name
            self._handles.append(hook.behind(module) if at == "output" else hook.before(module))
        self._hooked.append((logits_at, modules[logits_at]))
        self._handles.append(logits_hook.behind(modules[logits_at]))
        self._handles.append(EndHook(self, -2).behind(root, always=True))
        if self._make_slots(found, seen, refusals):
            logits_hook.jobs = (Job(n, False, True),)

    def _without_output(self, reason: str) -> None:
        """Warn once that gains are relative to a state, and why."""
        if not self._said_why:
            self._said_why = True
            warnings.warn(
                f"{reason}. Credit gains are relative to the last observed state, "
                f"{self.taps.labels[-1]}.",
                RuntimeWarning,
                stacklevel=user_level(),
            )

    def _find_tensor_ranks(self) -> None:
        if self._tensor_ranks is None:
            self._tensor_ranks = find_tensor_ranks(self.model, self.tensor_group, self.sharded)
            if self._settings is not None:
                self._settings.tensor_ranks = self._tensor_ranks

    def _exchange_group(self) -> Any:
        """Return the process group to merge over; None where there is nothing to merge."""
        found = default_group(self.group)
        if found is not None and not self._group_is_there(found):
            return None
        if found is not None or self._tensor_ranks is None:
            return found
        if len(self._tensor_ranks.groups) > 1:
            raise ValueError(
                "StepProbe: group: expected a process group around a mesh of tensor parallelism "
                "with several dimensions, got False; give one of a copy's ranks"
            )
        return self._tensor_ranks.groups[0]

    def _group_is_there(self, group: Any) -> bool:
        """Say, once and for all, whether every rank of the group records its steps."""
        if self._is_alone is None:
            if self._has_gpu:
                torch.cuda.synchronize()  # the host may be far ahead of the other ranks' hosts
            seconds = _SYNCHRONOUS_PATIENCE if self._is_wrapped else _PATIENCE
            self._is_alone = not all_present(group, seconds)
            if self._is_alone and self._tensor_ranks is not None:
                raise RuntimeError(
                    "StepProbe: expected a probe on every rank that holds a part of the model; "
                    "build it on all of them"
                )
        return not self._is_alone

    def _logits_module(self, seen: Trace) -> str:
        """Return the innermost module whose output is the logits tensor itself.

        A loss that the model computes in its own forward reads that tensor, not what it returns.
        """
        best = ""
        if callable(self.output):
            return best
        logits = output_of(seen.output, self.output)
        if logits is None:
            return best
        logits = seen.recorder.before_link(logits)
        calls: dict[str, int] = {}
        for call in seen.calls:
            calls[call.name] = calls.get(call.name, 0) + 1
        for call in seen.calls:
            same = call.output is not None and call.output.tensor is logits
            if same and calls[call.name] == 1 and call.output_type == "Tensor":
                best = call.name
        return best

    def _jobs(
        self, found: Taps, seen: Trace
    ) -> tuple[dict[tuple[str, str], list[Job]], dict[int, str]]:
        """Return which hooks of a compiled network send which tensors through which slots.

        A hook can replace what a module returns, for all that use it; replacing what one module
        RECEIVES would miss the other uses, the skip connection above all. The sum after a skip is
        therefore observed at its last summand, which has the same gradient.
        """
        jobs: dict[tuple[str, str], list[Job]] = {}
        refusals: dict[int, str] = {}
        calls: dict[str, int] = {}
        for call in seen.calls:
            calls[call.name] = calls.get(call.name, 0) + 1
        single = [call for call in seen.calls if calls[call.name] == 1]
        for l, point in enumerate(found.points):
            if calls.get(point.module, 0) > 1:
                refusals[l] = (
                    f"{point.where}: expected a module that a compiled forward calls once, got "
                    f"{calls[point.module]} calls; name other taps"
                )
                continue
            if point.at == "output":
                jobs.setdefault((point.module, "output"), []).append(Job(l, True, True))
                continue
            state = sighting_at(seen, point)
            assert state is not None
            maker = next(
                (
                    call
                    for call in reversed(single)
                    if call.output is not None
                    and call.output_type == "Tensor"
                    and call.output.tensor is state.tensor
                    and call.output.version == state.version
                ),
                None,
            )
            if maker is not None:
                jobs.setdefault((maker.name, "output"), []).append(Job(l, True, True))
                continue
            at = next(call.begin for call in seen.calls if call.name == point.module)
            branch = next(
                (
                    call
                    for call in reversed(single)
                    if call.end < at
                    and call.input is not None
                    and call.output is not None
                    and is_sum(state.tensor, call.input.tensor, call.output.tensor)
                ),
                None,
            )
            if branch is None:
                refusals[l] = (
                    f"{point.where}: expected a state that a module returns, or the sum of a "
                    f"module's input and output, to observe it in a compiled network; name other "
                    f"taps"
                )
                continue
            jobs.setdefault((branch.name, "output"), []).append(Job(l, False, True))
            jobs.setdefault((point.module, "input"), []).append(Job(l, True, False))
        return jobs, refusals

    def _make_slots(self, found: Taps, seen: Trace, refusals: Mapping[int, str]) -> bool:
        """Make what a compiled pass is observed through; say whether logits are among it."""
        settings = self._settings
        assert settings is not None
        states = [sighting_at(seen, point) for point in found.points]
        tensors = [like_whole(state.tensor) for state in states if state is not None]
        rows = [by_sample(tensor, self.batch_dim) for tensor in tensors]
        batch = rows[0].shape[0]
        rows = [settings.observed(row) for row in rows]
        reduced = [self.reduction.of_grad(row) for row in rows]
        samples = max(len(r) for r in reduced)
        per_sample = max(1, samples // max(1, rows[0].shape[0]))
        capacity = max(samples, self.max_samples or 0)
        logits = output_of(seen.output, self.output)
        if logits is not None:
            try:
                sample_rows(logits, batch, self.batch_dim, settings.name)
            except TapError:
                logits = None
        # Where logits count samples, and how many rows a sample has there: as sample_rows sees it.
        self._logits_dim, self._logits_per_sample = 0, 1
        shape = torch.Size() if logits is None else logits.shape
        fits = self.batch_dim < len(shape) and shape[self.batch_dim] == batch
        if logits is not None and fits and (len(shape) > 2 or shape[0] != batch):
            self._logits_dim = self.batch_dim
        elif logits is not None and batch and logits.shape[0] % batch == 0:
            self._logits_per_sample = logits.shape[0] // batch
        self._slots = Slots(
            found.labels,
            capacity,
            capacity // per_sample,
            {l: reduced[l].shape[1:] for l in settings.direction_layers},
            self.reduction,
            self.batch_dim,
            next(state.tensor.device for state in states if state is not None),
            refusals,
            self.samples,
            self._gradients,
            self._slot_parts.add,  # not of the probe, which the slots would keep alive
        )
        return logits is not None

    # ---- in the forward pass

    def _observes(self) -> bool:
        """Say whether passes are observed now; compiled code has the answer in it, with guards."""
        if exporting():
            return False
        return self._active and self.model.training and torch.is_grad_enabled()

    def _through(self, jobs: tuple[Job, ...], state: Tensor) -> Tensor:
        """Send a tensor through its slots inside of a compiled graph."""
        if not state.requires_grad:
            return state
        if is_dtensor(state):
            raise RuntimeError(_NOT_COMPILED)
        for job in jobs:
            samples = 0
            if job.slot == self._n:
                samples = state.shape[self._logits_dim] // self._logits_per_sample
            assert self._slots is not None
            state = self._slots.through(job, state, samples)
        return state

    def _begin(self, args: Any, kwargs: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed model runs again
        self._current = None
        if not (torch.is_grad_enabled() and self.model.training) or recorded():
            return
        if transformed():
            self._was_transformed = True
            return
        if not self._wanted and not (self._has_gpu and torch.cuda.is_current_stream_capturing()):
            self._passed_unwanted = True
            return
        if not self._prepared:
            self._prepare_from_call(args, kwargs)
        elif self._looks_again and not (self._parts or self._slot_parts or self._observations):
            self._look_again(args, kwargs)
            if not self._active:
                return
        self._given = (args, kwargs)
        assert self._settings is not None
        if self._in_compiled is None:
            self._in_compiled = self._find_compiled()
            self._find_tensor_ranks()  # it may have been spread since the example was run
        self._reduce_finished()
        self._current = Pass(self._settings, self._opened, _name_of(autocast_dtype()))

    def _look_again(self, args: Any, kwargs: Any) -> None:
        """Choose the taps anew, in a pass that has other calls or modules than the first one."""
        self._looks_again = False
        before = self.taps.points
        x = self._example
        if self._looks_with is not None:
            args, kwargs = self._looks_with
            self._looks_with = x = None
        self._resolve()
        if self._ring is not None:
            self._emit(self._ring.drain())
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked, self._looped = [], [], []
        self._ring = self._directions = self._replay = self._in_compiled = None
        self._prepared = False
        try:
            self._prepare(_as_input(self.model, args, kwargs) if x is None else x)
        except TapError as error:
            # The training goes on, come what may.
            warnings.warn(
                f"StepProbe: step {self._step}: {error}. Nothing is observed from here on.",
                RuntimeWarning,
                stacklevel=user_level(),
            )
            self._active = self._wanted = False
            return
        if self.taps.points != before:
            _log.info("%s: step %d: %s", type(self.model).__name__, self._step, self._observed)

    def _may_look_again(self) -> bool:
        """Say whether the taps can be chosen anew: not by one rank alone, nor inside of a graph."""
        return self._exchange_group() is None and self._graphed is None

    def _called_more(self, current: Pass) -> None:
        """Note that a pass has called modules more often than the one that showed the taps."""
        more = {
            hook.name for hook, known in self._looped if current.calls.get(hook.number, 0) > known
        }
        more |= {self.taps.points[l].module for l in current.again}
        new = more - self._said_calls
        if not new:
            return
        # A longer sequence shows all calls to whoever looks; what it cannot show is told.
        counts = {hook.name: known for hook, known in self._looped}
        if self._may_look_again() and self._calls_looked_at != counts:
            self._calls_looked_at, self._looks_again = counts, True
            self._looks_with = self._given
            return
        self._said_calls |= new
        warnings.warn(
            f"StepProbe: step {self._step}: {', '.join(sorted(new))}: expected as many calls as in "
            f"the pass that showed the taps, got more: the later ones are not observed; name taps "
            f"that are called once, or give example= with an input that shows them all",
            RuntimeWarning,
            stacklevel=user_level(),
        )

    def _look_for_replaced(self, figures: Figures, step: int) -> None:
        """Find modules that took the place of others since the hooks were put there."""
        lack = (frozenset(figures.missing), not figures.has_error)
        if lack == self._last_lack:
            return
        self._last_lack = lack
        if not (figures.missing or not figures.has_error):
            return
        now = {clean_name(name): module for name, module in self.model.named_modules()}
        replaced = [name for name, module in self._hooked if now.get(name) is not module]
        if not replaced:
            return
        again = self._may_look_again()
        self._looks_again = again
        warnings.warn(
            f"StepProbe: step {step}: {', '.join(replaced)} replaced since the probe was "
            f"installed: what the new modules do is not in this step's record"
            + ("; from the next one on it is" if again else "; build the probe anew"),
            RuntimeWarning,
            stacklevel=user_level(),
        )

    def _find_compiled(self) -> frozenset[int]:
        """Return the states whose module, or one around it, is compiled on its own."""
        compiled = [
            clean_name(name)
            for name, module in self.model.named_modules()
            if getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(module, "_orig_mod")
        ]
        return frozenset(
            l
            for l, point in enumerate(self.taps.points)
            for name in compiled
            if point.module == name or point.module.startswith(f"{name}.")
        )

    def _opened(self, observation: Observation) -> None:
        self._steps.count()
        if observation.purpose == TRAINS:
            self._gradients.begins()
        self._observations.append(observation)
        self._backward_of = observation.of

    def _forget_cleared(self) -> None:
        """Leave out backward passes whose gradients were cleared before an optimiser used them.

        As after an exception that was caught, or when the loss of another network is gone.
        """
        count = len(self._observations) + len(self._parts) + len(self._slot_parts)
        if count:
            _log.info(
                "%s: step %d: left out %d earlier forward passes, whose gradients were cleared",
                type(self.model).__name__,
                self._step,
                count,
            )
        self._forget_passes()

    def _forget_passes(self) -> None:
        for observation in self._observations:
            observation.forget()
        self._observations = []
        self._parts.clear()
        self._slot_parts.clear()

    def _reduce_finished(self) -> None:
        """Reduce the micro-batches whose backward passes have ended; drop broken ones."""
        observations, self._observations = self._observations, []
        for observation in observations:
            if not observation.finished:
                observation.forget()
                continue
            of = observation.of
            self._autocast = of.autocast
            self._seconds += of.seconds
            of.seconds = 0.0
            figures = observation.figures()
            if figures is not None:
                self._parts.add(figures)
        if self._slots is not None:
            self._slots.forget()
        self._backward_of = None

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
        if not self._active:  # the probe is removed
            return
        self._steps.begun = True
        # As torch.no_grad does, at a seventh of its time.
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            self._end_step()
        finally:
            torch._C._set_grad_enabled(enabled)

    def _end_step(self) -> None:
        began = time.perf_counter()
        step = self._step
        captured = self._has_gpu and torch.cuda.is_current_stream_capturing()
        self._current = None
        parts: list[Figures] = []
        replayed = False
        try:
            if not captured:
                self._resolve()
            replayed = not captured and self._reduce_by_graph(step)
            self._reduce_finished()
            parts = self._take_parts()
            if not replayed:
                parts = parts or self._aside
        finally:
            self._aside = []
            self._observations = []
            self._parts.clear()
            self._slot_parts.clear()
            if not captured:
                self._advance()
        if captured:
            self._passed_unwanted = False
            self._capture(parts)
            return
        eager, self._passed_unwanted = replayed or self._passed_unwanted, False
        if not parts and self._graphed is not None and not eager:
            # Nothing but a replay of the training's graph leaves no trace on the host.
            assert self._ring is not None
            meta = self._graphed
            wanted = self._step_was_wanted
            self._emit(self._ring.written(meta._replace(step=step) if wanted else None, False))
            self._emit(self._ring.ready())
            return
        if not parts and self._step_was_wanted and not replayed:
            raise RuntimeError(self._nothing_arrived(step))
        if parts and self._step_was_wanted:
            self._finish(merged(parts), step)
        if self._ring is not None:
            self._emit(self._ring.ready())
        now = time.perf_counter()
        if self._step_was_wanted:
            self.schedule.note(step, self._seconds + now - began, now - self._step_began)
            self._wanted = self._schedule_wants()  # it may think better of the next one now
        self._gradients.ignored = False
        self._seconds = 0.0
        self._step_began = now

    def _reduce_by_graph(self, step: int) -> bool:
        """Record the step at hand through a CUDA graph of its reduction, if one will do.

        One micro-batch whose states were all kept, with the same shapes as those before it, in a
        process of its own and without a scaler.
        """
        plain = self._has_gpu and self._ring is not None and self.scaler is None
        if not plain or len(self._observations) != 1 or self._parts or self._slot_parts:
            return False
        observation = self._observations[0]
        tensors = observation.whole() if observation.finished and self._wanted else None
        if tensors is None or not tensors[0].is_cuda:
            return False
        assert self._ring is not None
        starts = 0 if self._directions is None else self._directions.starts
        if self._replay is not None and self._replayed_starts != starts:
            self._replay = None  # it reads and writes directions where they were
        if self._replay is None or self._replay.like != like_of(tensors):
            made = self._make_replay(tensors)
            if made is None:
                return False
            self._replay, self._replayed_starts = made, starts
        of = observation.of
        self._autocast = of.autocast
        self._seconds += of.seconds
        self._observations = []
        self._backward_of = None
        self._replay(tensors)
        observation.forget()
        sizes = tuple([math.prod(shape[1:]) for shape, _ in self._replay.like[: self._n]])
        meta = _Meta(step, sizes, OUTPUT, tensors[-1].shape[0], 1, of.autocast, (), False)
        self._emit(self._ring.written(meta))
        return True

    def _make_replay(self, tensors: Sequence[Tensor]) -> Replay | None:
        """Return a graph that reduces tensors like these, once they are what keeps coming."""
        n, ring, like = self._n, self._ring, like_of(tensors)
        logits, states, grads = tensors[-1], like[:n], like[n:-1]
        if logits.is_complex() or states != grads:
            return None
        if any(shape[0] != len(logits) or dtype != logits.dtype for shape, dtype in grads):
            return None
        self._alike = self._alike + 1 if like == self._like else 1
        self._like = like
        refused = self._replay_refused or self._exchange_group() is not None
        if refused or self._alike <= STEPS_BEFORE or ring is None:
            return None
        if ring.device != tensors[0].device:
            return None

        def reduce(places: Sequence[Tensor]) -> None:
            assert self._settings is not None
            directions = self._settings.direction_layers
            found = ops.layer_statistics([*places[:n], places[-1]], places[n:], means=directions)
            assert isinstance(found, ops.PackedStatistics)
            means: list[Tensor | None] = [found.mean_of(l) for l in directions]
            figures = Figures(found.norms, means, set(), len(places[-1]))
            self._write_row(figures, None, captured=True)

        try:
            return Replay(tensors, reduce)
        except Exception:
            # It goes on call by call, as it has so far.
            self._replay_refused = True
            return None

    def _advance(self) -> None:
        self._step_was_wanted = self._wanted
        self._step += 1
        self._wanted = self._schedule_wants()

    def _schedule_wants(self) -> bool:
        return self._active and bool(self.schedule.wants(self._step))

    def _take_parts(self) -> list[Figures]:
        best = max((part.purpose for part in self._parts), default=0)
        eager = [part for part in self._parts if part.purpose == best]
        compiled = list(self._slot_parts)
        if compiled and self._tensor_ranks is not None:
            raise RuntimeError(_NOT_COMPILED)
        if compiled:
            self._tell_flaws(first=not self._compiled_passes)
            self._compiled_passes += len(compiled)
        if compiled and not eager:
            self._autocast = _name_of(self._compiled_autocast)
        if eager and len(eager) == len(compiled):  # some modules are compiled, others not
            return [_joined(a, b) for a, b in zip(eager, compiled, strict=True)]
        return eager + compiled

    def _tell_flaws(self, first: bool) -> None:
        """Tell what a compiled backward pass cannot show, and stop where that is so from the first.

        Later on this is asked for figures that are NaN, and not of every step: it waits.
        """
        slots = self._slots
        captured = self._has_gpu and torch.cuda.is_current_stream_capturing()
        if slots is None or captured or self._told_flaws:
            return
        if slots.summed_passes():
            self._told_flaws = True
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
            self._told_flaws = True
            self._without_output(
                "StepProbe: output: expected a compiled forward to make the logits of all samples "
                "in each call, got calls for some of the samples each, which cannot be told apart"
            )

    def _nothing_arrived(self, step: int) -> str:
        compiled = any(
            hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
            for module in self.model.modules()
        )
        more = ""
        if not self.model.training:
            more = "; the model is in eval mode, whose passes are not looked at: call model.train()"
        elif self._was_transformed:
            more = (
                "; passes inside of function transforms (torch.func.grad, vmap and others) are not "
                "looked at: differentiate with backward() or torch.autograd.grad"
            )
        elif self._gradients.ignored:
            more = (
                "; a backward pass that adds to no parameter's .grad, as torch.autograd.grad for "
                "inputs does, is not counted: differentiate the loss with backward()"
            )
        elif not self._prepared:
            more = "; the model was not called in training mode with gradients enabled"
        elif self._slots is not None and self._slots.refusal and (compiled or _has_compiled()):
            more = f"; of a compiled model, {self._slots.refusal}"
        elif compiled or _has_compiled():
            more = (
                "; if the model is compiled, the probe must be built before its first compiled call"
            )
        return (
            f"StepProbe.step: step {step}: expected a backward pass through the model since the "
            f"last step, got none{more}"
        )

    def _finish(self, figures: Figures, step: int) -> None:
        device = figures.norms.device
        self._make_ring(device)
        self._look_for_replaced(figures, step)
        self._share.look()
        found_group = self._exchange_group()
        meta = self._meta(figures, step, found_group is not None)
        scaling = self._scaling(figures)
        if found_group is None:
            self._write_row(figures, scaling)
            if scaling is None:
                self._send(meta)
            else:
                self._held, self._unresolved = (meta, scaling), scaling
            return
        self._settle()
        self._unresolved = scaling
        if self._exchange is None:
            if isinstance(self.schedule, Budget):
                raise ValueError(
                    "StepProbe: schedule: expected one by which all ranks record the same steps, "
                    "got a share of each rank's own time; give a number, 'every' or 'log'"
                )
            # Every rank must decide alike: by the parameters, not by what a step happened to see.
            wide = any(p.dtype == torch.float64 for p in self.model.parameters())
            # A group that the user names shares a batch, whatever weights its ranks hold.
            compared = self.group is None and self._tensor_ranks is None
            assert self._settings is not None
            self._exchange = Exchange(
                found_group,
                self.max_samples,
                wide,
                self._tensor_ranks,
                self._settings.labels,
                fingerprint(self.model.parameters()) if compared else None,
            )
        # The mean of no samples is NaN, and their sum zero.
        empty = figures.samples == 0
        sums = [
            mean if mean is None else torch.zeros_like(mean) if empty else mean * figures.weight
            for mean in figures.means
        ]
        rows = torch.cat([figures.norms.flatten(0, 1), figures.root_mean_squares()])
        pending = self._exchange.start(rows, sums)
        self._share.leads = self._exchange.leads
        self._pending = (pending, meta, scaling)

    def _settle(self) -> None:
        """Finish the step whose collective is under way."""
        if self._pending is None:
            return
        (pending, meta, scaling), self._pending = self._pending, None
        found = pending.wait()
        copies = len(found.counts)
        samples = found.counts.double().sum()
        # Behind the norms the root mean squares: ranks pad their batches to lengths of their own.
        norms = found.samples[: 2 * self._n + 2].view(2, self._n + 1, -1)
        rms = found.samples[2 * self._n + 2 :]
        # The optimiser sees the average of the copies' gradients, each of its own samples only.
        norms[1].div_(copies)
        means: list[Tensor | None] = [
            None if s is None else s / samples.to(s.dtype) for s in found.directions
        ]
        figures = Figures(norms, means, set(meta.missing), None, samples, rms=rms)
        if scaling is not None:
            scaling.overflowed(self._overflowed(figures))
        assert self._exchange is not None
        meta = meta._replace(samples=None, world_size=self._exchange.world)
        self._write_row(figures, scaling)
        self._send(meta)

    def _meta(self, figures: Figures, step: int, exchanged: bool = False) -> _Meta:
        reference = OUTPUT
        if not figures.has_error:
            n = self._n
            reference = self.taps.labels[-1]
            figures.norms[1, n].copy_(figures.norms[1, n - 1])
        return _Meta(
            step,
            () if exchanged or figures.rms is not None else figures.sizes,
            reference,
            figures.samples,
            figures.micro_batches,
            self._autocast,
            tuple(sorted(figures.missing)),
            self.scaler is not None,
        )

    def _scaling(self, figures: Figures) -> _Scaling | None:
        """Return what is known of the gradient scaler so far."""
        if self.scaler is None:
            return None
        states = getattr(self.scaler, "_per_optimizer_states", {}).values()
        flags = [
            flag for state in states for flag in state.get("found_inf_per_device", {}).values()
        ]
        return _Scaling(self.scaler, self._overflowed(figures), flags)

    def _resolve(self) -> None:
        """Finish the step whose scaler has been updated since: what it says comes afterwards."""
        if self._unresolved is not None:
            self._unresolved.resolve()
            self._unresolved = None
        if self._held is not None:
            (meta, scaling), self._held = self._held, None
            assert self._ring is not None
            self._ring.newest()[self._scaling_at : self._scaling_at + 2] = scaling.figures()
            self._send(meta)

    def _overflowed(self, figures: Figures) -> Tensor:
        """Say on the device whether a gradient that arrived is not finite."""
        norms, n = figures.norms, self._n
        if not figures.missing and figures.samples is not None:
            return ~torch.isfinite(norms[1, :n]).all()
        there = [l for l in range(n) if l not in figures.missing]
        hidden, grad = (torch.stack([norms[i, l] for l in there]) for i in (0, 1))
        # A place without a sample holds NaN in both.
        return (torch.isinf(grad) | (torch.isnan(grad) & ~torch.isnan(hidden))).any()

    def _write_row(
        self, figures: Figures, scaling: _Scaling | None, captured: bool = False
    ) -> None:
        """Write all figures of a step into the ring; see :meth:`_record` for their places."""
        assert self._ring is not None
        norms, kept = figures.norms, self._directions
        directions = None if kept is None else kept.take(figures.means, captured)
        extras: list[Tensor] = []
        if kept is not None and directions is None:
            extras.append(norms.new_full((kept.num_layers * kept.width,), torch.nan))
        if scaling is not None:
            extras.append(scaling.figures())
        if figures.rms is not None:
            extras.append(torch.nanmedian(figures.rms, 1).values)
        if figures.samples is None and figures.count is not None:
            extras.append(figures.count.reshape(1).double())
        ops.step_row(
            norms.contiguous(),
            directions or (),
            kept.kept if kept is not None and directions else (),
            self._ring.device_rows,
            self._ring.places,
            decay=self.decay,
            extras=extras,
        )

    def _make_ring(self, device: torch.device) -> None:
        if self._ring is not None and self._ring.device == device:
            return
        if self._ring is not None:
            self._emit(self._ring.drain())
        self._replay = None  # it writes into the ring that was
        kept = self._directions
        # Behind medians and cosines; then the root mean squares where the host does not know the
        # sizes, and the number of samples likewise.
        self._scaling_at = 3 * self._n + 2 + (kept.num_layers * kept.width if kept else 0)
        # A row that waits for what the scaler did needs a place beside the next one's.
        rows = self._ring_rows if self.scaler is None else max(2, self._ring_rows)
        self._ring = Ring(rows, self._scaling_at + 3 + self._n, device)

    def _send(self, meta: _Meta) -> None:
        assert self._ring is not None
        self._emit(self._ring.written(meta))

    def _capture(self, parts: list[Figures]) -> None:
        """Record a step into a CUDA graph; each replay then leaves a row in the device's ring."""
        if not parts:
            raise RuntimeError(self._nothing_arrived(self._step))
        figures = merged(parts)
        if self._ring is None or self._ring.device != figures.norms.device:
            raise RuntimeError(
                "StepProbe: expected at least one step outside of the CUDA graph first; run one "
                "before capturing"
            )
        if self._exchange_group() is not None:
            raise RuntimeError(
                "StepProbe: expected a single process inside of a CUDA graph, got a process group; "
                "give group=False to observe each rank's own samples"
            )
        meta = self._meta(figures, -1)
        self._write_row(figures, self._scaling(figures), captured=True)
        kept = () if self._directions is None else self._directions.kept
        self._graph_memory.append((self._ring.device_rows, self._ring.places, *kept))
        self._graphed = meta

    # ---- on the host

    def _record(self, meta: _Meta, row: list[float]) -> StepRecord:
        # Of every step, on the training's thread: the usual case is told by few calls.
        n = self._n
        hidden, grad = row[:n], row[n + 1 : 2 * n + 1]  # row n of the states means nothing
        error, gain = row[2 * n + 1], row[2 * n + 2 : 3 * n + 2]
        at = 3 * n + 2
        stabilities, averages = [math.nan] * n, [math.nan] * n
        num_directions = 0
        directions, settings = self._directions, self._settings
        assert settings is not None
        if directions is not None:
            for layer in settings.direction_layers:
                averages[layer] = row[at + directions.window]
                known = row[at : at + directions.window]
                at += directions.width
                total = math.fsum(known)
                if math.isnan(total):
                    known = [cosine for cosine in known if not math.isnan(cosine)]
                    total = math.fsum(known)
                num_directions = max(num_directions, len(known))
                if known:
                    stabilities[layer] = total / len(known)
        if error != error and self._compiled_passes:  # NaN
            self._tell_flaws(first=False)
        scale, skipped = 1.0, False
        if meta.scaled:
            scale, skipped = row[at], row[at + 1] != 0
            at += 2
            grad = [norm / scale for norm in grad]
        if meta.sizes:
            rms = tuple(map(truediv, hidden, _roots(meta.sizes)))
        else:
            rms = tuple(row[at : at + n])
            at += n
        labels = settings.labels
        return StepRecord.of(
            step=meta.step,
            layers=labels,
            hidden_norms=tuple(hidden),
            rms_norms=rms,
            grad_norms=tuple(grad),
            credit_gains=tuple(gain),
            output_grad_norm=error / scale,
            stabilities=tuple(stabilities),
            average_cosines=tuple(averages),
            num_directions=num_directions,
            num_samples=int(row[at]) if meta.samples is None else meta.samples,
            micro_batches=meta.micro_batches,
            skipped=skipped,
            loss_scale=scale,
            autocast=meta.autocast,
            unreached=tuple([labels[l] for l in meta.missing]) if meta.missing else (),
            loss_reduction=self.loss_reduction,
            world_size=meta.world_size,
            chain_starts=self._chain_starts,
            gain_reference=meta.reference,
            observed=self._observed,
        )

    def _emit(self, rows: Sequence[tuple[_Meta, list[float]]]) -> None:
        stop: TrainingStopped | None = None
        for meta, row in rows:
            record = self._record(meta, row)
            for taker in self._takers:
                try:
                    taker(record)
                except TrainingStopped as stopped:
                    stop = stop or stopped  # the other records are handed out first
            self._tell_events()
        if stop is not None:
            raise stop

    @torch.no_grad()
    def flush(self) -> None:
        """Wait for all figures under way, and until the sinks have them.

        Raises:
            TrainingStopped: an alarm that came with them stops the training.
        """
        try:
            self._resolve()
            self._settle()
            if self._ring is not None:
                self._emit(self._ring.drain())
        finally:
            for sink in self._sinks:
                sink.flush()

    @torch.no_grad()
    def set_aside(self) -> None:
        """Leave the micro-batches so far out of the next step, if others come before it.

        For a loop with several optimisers: a backward pass of another network's loss through this
        one belongs to the step of the other's optimiser, after which this is called.
        """
        self._current = None
        self._reduce_finished()
        parts = self._take_parts()
        if parts:
            self._aside = parts
        self._parts.clear()
        self._slot_parts.clear()

    def skip(self) -> None:
        """Count an optimiser step of which nothing is recorded, as of a batch that is left out."""
        self.discard()
        self._advance()

    def discard(self) -> None:
        """Forget the micro-batches since the last step, as when their gradients are thrown away.

        A backward pass that raised is left out by itself; this is for a step that is given up after
        its backward pass.
        """
        self._current = None
        self._aside = []
        self._forget_passes()

    def remove(self) -> None:
        """Flush, take all hooks away, and close the sinks that were opened here.

        The model is as it was before.

        Raises:
            TrainingStopped: as :meth:`flush` does.
        """
        try:
            self.flush()
        finally:
            for handle in (*self._handles, *self._preparing):
                handle.remove()
            self._handles, self._preparing = [], []
            self._active = self._wanted = False
            self.discard()
            self._steps.tell()
            _alive.discard(self)
            for sink in self._own_sinks:
                sink.close()

    def __enter__(self) -> StepProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _joined(eager: Figures, compiled: Figures) -> Figures:
    """Return one micro-batch that was seen in part by hooks, in part by slots."""
    seen = eager.norms
    return Figures(
        torch.where(torch.isnan(seen), compiled.norms[..., : seen.shape[2]], seen),
        [a if a is not None else b for a, b in zip(eager.means, compiled.means, strict=True)],
        eager.missing & compiled.missing,
        eager.samples,
        rms=_of_both(eager, compiled),
        has_error=eager.has_error or compiled.has_error,
    )


def _of_both(eager: Figures, compiled: Figures) -> Tensor:
    seen = eager.root_mean_squares()
    other = compiled.root_mean_squares()[..., : seen.shape[1]]
    return torch.where(torch.isnan(seen), other, seen)
