"""Put the probe into a network: choose the taps, hang up the hooks, and look again if need be."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._common.warn import user_level
from ..capture import untouched
from ..capture.batches import counts_samples
from ..capture.points import TapError, Taps, sighting_at
from ..capture.taps import find_taps
from ..capture.tracing import Trace, clean_name
from ..protocol import middle_layer
from .compiled_plan import LogitsPlace, logits_module, make_gradient_taps, plan_jobs
from .compiled_taps import Job
from .figures import StepFigures
from .forward_pass import Pass, Settings
from .hooks import (
    EndHook,
    Handle,
    Hook,
    InputHook,
    LogitsHook,
    OutputHook,
    PrepareHook,
    RootHook,
)
from .observer import Observer, others_suspended
from .options import ProbeOptions
from .tensor_parallel import TensorRanks, find_tensor_ranks

# All states and gradients of a pass together: small beside any training that has larger ones.
_KEPT_BYTES = 8 * 2**20

_log = logging.getLogger("fadiag_fast.training")


class TapsUser(Protocol):
    """Who records what is tapped."""

    def installed(self, taps: Taps, settings: Settings) -> None: ...

    def may_change_taps(self) -> bool: ...

    def finish_rows(self) -> None: ...


class Installation:
    """The hooks of a probe in a network, and the taps they stand for.

    Args:
        model: the probed one, unwrapped.
        given: the module whose call shows the first pass: the model, or a wrapper around it.
        options: of the probe.
        owner: lives as long as the hooks do, although nobody else may hold it.

    Attributes:
        observer: what the hooks talk to.
        taps: None before the first choice.
        prepared: whether the hooks are in place.
        tensor_ranks: that hold one copy of the model together; None without such.
    """

    def __init__(
        self,
        model: nn.Module,
        given: nn.Module,
        options: ProbeOptions,
        owner: object,
    ) -> None:
        self.model = model
        self._owner = owner
        self._given = given
        self._options = options
        self._user: TapsUser | None = None
        self.observer = Observer(model, options.output, self)
        self.taps: Taps | None = None
        self.prepared = self._preparing_now = False
        self.tensor_ranks: TensorRanks | None = None
        self._example: Any = None
        self._handles: list[Handle] = []
        self._preparing: list[Handle] = []
        self._hooked: list[tuple[str, nn.Module]] = []  # modules with hooks, by name
        self._looped: list[tuple[Hook, int]] = []  # hooks of what is called several times
        self._last_lack: tuple[frozenset[int], bool] = (frozenset(), False)
        self._looks_with: tuple[Any, Any] | None = None
        self._said_calls: set[str] = set()
        self._calls_looked_at: dict[str, int] | None = None
        self._said_why = False

    # ---- choosing the taps

    def prepare(self, example: Any, user: TapsUser) -> None:
        """Choose the taps by an example, or in the first pass where there is none.

        Args:
            example: an input batch; None for the first pass's own.
            user: whose taps they are.
        """
        self._user = user
        if example is None:
            self._preparing.append(PrepareHook(self.observer, -1).before(self._given))
            return
        self._example = (example,) if isinstance(example, Tensor) else example
        self._prepare(self._example)

    def prepare_from_call(self, args: Any, kwargs: Any) -> None:
        """Choose the taps by the arguments of the model's own first call."""
        if self.observer.awaits_first_pass() and not self._preparing_now:
            self._prepare(_as_input(self.model, args, kwargs))

    def _prepare(self, x: Any) -> None:
        self._preparing_now = True
        try:
            # Another probe's pass may be under way, in which this look at the model has no part.
            with others_suspended(self.model):
                # Before the model runs: fully_shard then shows its parameters as they are kept.
                self.find_tensor_ranks()
                self._find_and_install(x)
        except BaseException as error:
            # The next pass is the first one then.
            self._remove_hooks()
            shape = _without_batch(x)
            if isinstance(error, TapError) and shape is not None:
                raise TapError(
                    f"{error} The input has shape {list(shape)}: if it is one sample without a "
                    f"batch dimension, call the model with x[None], of shape {[1, *shape]}."
                ) from error
            raise
        finally:
            self._preparing_now = False
        for handle in self._preparing:
            handle.remove()
        self._preparing = []
        self.prepared = True

    def _find_and_install(self, x: Any) -> None:
        options = self._options
        with untouched(self.model):
            found, seen = find_taps(
                self.model,
                x,
                options.select,
                lambda state: counts_samples(x, state, options.batch_dim),
                batch_dim=options.batch_dim,
                several=options.reduction.kind != "token",
            )
            if found.hands_out:
                raise TapError(
                    f"{type(self.model).__name__}: expected states that pass through modules "
                    f"in training, got a forward that hands them out under "
                    f"return_hidden=True; name the taps"
                )
            self._install(found, seen)

    def _install(self, found: Taps, seen: Trace) -> None:
        if not found.points:
            raise TapError(f"{type(self.model).__name__}: expected at least one state, got none")
        self.taps = found
        _log.info("%s: %s", type(self.model).__name__, found.observed)
        observer = self.observer
        observer.settings = settings = self._settings(found, seen)
        self._check_sharded(found)
        jobs, refusals = plan_jobs(found, seen)
        logits_hook = self._hang_up(found, seen, jobs)
        observer.slots, place = make_gradient_taps(
            found,
            seen,
            settings,
            refusals,
            self._options.output,
            self._options.max_samples,
            observer.compiled.add,  # not of the observer, which the slots would keep alive
        )
        observer.logits_place = place or LogitsPlace()
        if place is not None:
            logits_hook.jobs = (Job(len(found.points), False, True),)
        if self._user is not None:
            self._user.installed(found, settings)

    def _settings(self, found: Taps, seen: Trace) -> Settings:
        options, n = self._options, len(found.points)
        layers: tuple[int, ...] = {
            "middle": (middle_layer(n),),
            "all": tuple(range(n)),
            "none": (),
        }[options.directions.layers]
        limits = {"passing": -1, "together": 2**62, "auto": _KEPT_BYTES // (2 * (n + 1))}
        sightings = [sighting_at(seen, point) for point in found.points]
        if all(s is not None and s.tensor.dim() == 1 for s in sightings):
            assert sightings[0] is not None
            raise TapError(
                f"{type(self.model).__name__}: {found.labels[0]}: expected a state with a batch "
                f"dimension and features, got shape {list(sightings[0].tensor.shape)}."
            )
        return Settings(
            type(self.model).__name__,
            found.labels,
            options.reduction,
            options.batch_dim,
            layers,
            self.observer.gradients,
            limits[options.mode],
            any(s is not None and s.tensor.is_complex() for s in sightings),
            {l for l, s in enumerate(sightings) if s is not None and s.overwritten},
            tensor_ranks=self.tensor_ranks,
            samples=options.samples,
            remark=self.warn_without_output,
        )

    def _check_sharded(self, found: Taps) -> None:
        names = (*found.labels, "output")
        for pattern in self._options.sharded:
            if not any(fnmatch(name, pattern) for name in names):
                raise TapError(
                    f"StepProbe: sharded: expected names of observed states ({', '.join(names)}), "
                    f"got {pattern!r}"
                )

    def _hang_up(
        self, found: Taps, seen: Trace, jobs: Mapping[tuple[str, str], list[Job]]
    ) -> LogitsHook:
        """Put all hooks in place; return the one of what makes the logits."""
        observer, points = self.observer, found.points
        modules: dict[str, nn.Module] = {
            clean_name(name): module for name, module in self.model.named_modules()
        }
        logits_at = logits_module(seen, self._options.output)
        hooks: dict[tuple[str, str], Hook] = {}

        def hook_at(name: str, at: str) -> Hook:
            key = (name, at)
            if key not in hooks:
                kind = OutputHook if at == "output" else InputHook
                hooks[key] = kind(observer, len(hooks))
            return hooks[key]

        for l, point in enumerate(points):
            hook_at(point.module, point.at).taps += ((point.call, l),)
        for (name, at), more in jobs.items():
            hook_at(name, at).jobs += tuple(more)
            if at == "output":
                own = [job.slot for job in more if job.state and points[job.slot].at == "input"]
                hook_at(name, at).stand_ins += tuple(own)
        logits_hook = LogitsHook(observer, len(hooks))
        logits_hook.is_inner = logits_at != ""
        calls = Counter(call.name for call in seen.calls)
        self._handles.append(RootHook(observer, -1).before(self.model))
        for (name, at), hook in hooks.items():
            hook.several = calls[name] > 1
            module = modules[name]
            self._hooked.append((name, module))
            if hook.several:
                self._looped.append((hook, calls[name]))
            hook.name = name
            self._handles.append(hook.behind(module) if at == "output" else hook.before(module))
        self._hooked.append((logits_at, modules[logits_at]))
        self._handles.append(logits_hook.behind(modules[logits_at]))
        self._handles.append(EndHook(observer, -2).behind(self.model, always=True))
        observer.looped = [(hook.number, known) for hook, known in self._looped]
        return logits_hook

    def find_tensor_ranks(self) -> None:
        """Find the ranks that hold one copy of the model together, unless they are known."""
        if self.tensor_ranks is None:
            options = self._options
            self.tensor_ranks = find_tensor_ranks(self.model, options.tensor_group, options.sharded)
            if self.observer.settings is not None:
                self.observer.settings.tensor_ranks = self.tensor_ranks

    def compiled_states(self) -> frozenset[int]:
        """Return the states whose module, or one around it, is compiled on its own."""
        assert self.taps is not None
        self.find_tensor_ranks()  # it may have been spread since the example was run
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

    def warn_without_output(self, reason: str) -> None:
        """Warn once that gains are relative to a state, and why."""
        if not self._said_why and self.taps is not None:
            self._said_why = True
            warnings.warn(
                f"{reason}. Credit gains are relative to the last observed state, "
                f"{self.taps.labels[-1]}.",
                RuntimeWarning,
                stacklevel=user_level(),
            )

    # ---- choosing them again

    def look_again(self, args: Any, kwargs: Any) -> bool:
        """Choose the taps again, in a pass that has other calls or modules than the first one.

        Returns:
            Whether anything is observed from here on.
        """
        assert self.taps is not None
        observer, before = self.observer, self.taps.points
        x = self._example
        if self._looks_with is not None:
            args, kwargs = self._looks_with
            self._looks_with = x = None
        if self._user is not None:
            self._user.finish_rows()
        self._remove_hooks()
        self._hooked, self._looped = [], []
        observer.in_compiled = None
        self.prepared = False
        try:
            self._prepare(_as_input(self.model, args, kwargs) if x is None else x)
        except TapError as error:
            # The training goes on, come what may.
            warnings.warn(
                f"StepProbe: step {observer.step}: {error}. Nothing is observed from here on.",
                RuntimeWarning,
                stacklevel=user_level(),
            )
            observer.active = observer.wanted = False
            return False
        if self.taps.points != before:
            name = type(self.model).__name__
            _log.info("%s: step %d: %s", name, observer.step, self.taps.observed)
        return True

    def called_more(self, current: Pass, given: tuple[Any, Any] | None) -> None:
        """Note that a pass has called modules more often than the one that showed the taps."""
        assert self.taps is not None
        more = {
            hook.name for hook, known in self._looped if current.calls.get(hook.number, 0) > known
        }
        more |= {self.taps.points[l].module for l in current.again}
        new = more - self._said_calls
        if not new:
            return
        # A longer sequence shows all calls to whoever looks; what it cannot show is told.
        counts = {hook.name: known for hook, known in self._looped}
        if self._may_change() and self._calls_looked_at != counts:
            self._calls_looked_at, self.observer.looks_again = counts, True
            self._looks_with = given
            return
        self._said_calls |= new
        warnings.warn(
            f"StepProbe: step {self.observer.step}: {', '.join(sorted(new))}: expected as many "
            f"calls as in the pass that showed the taps, got more: the later ones are not "
            f"observed; name taps that are called once, or give example= with an input that shows "
            f"them all",
            RuntimeWarning,
            stacklevel=user_level(),
        )

    def look_for_replaced(self, figures: StepFigures, step: int) -> None:
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
        again = self._may_change()
        self.observer.looks_again = again
        warnings.warn(
            f"StepProbe: step {step}: {', '.join(replaced)} replaced since the probe was "
            f"installed: what the new modules do is not in this step's record"
            + ("; from the next one on it is" if again else "; build the probe anew"),
            RuntimeWarning,
            stacklevel=user_level(),
        )

    def _may_change(self) -> bool:
        return self._user is not None and self._user.may_change_taps()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def remove(self) -> None:
        """Take all hooks away: the model is as it was before."""
        self._remove_hooks()
        for handle in self._preparing:
            handle.remove()
        self._preparing = []
        self.observer.active = self.observer.wanted = False


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
