"""The hooks that a training probe leaves on modules: they see states, and nothing else.

Inside of ``torch.compile`` they are traced, and send states through slots in place of noting them.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import output_of
from ..capture.tracing import argument_state, exporting, recorded, state_in, transformed
from .compiled_taps import Job
from .observer import Observer

# -1 outside of a backward pass.
_backward_task = torch._C._current_graph_task_id
# A function inside of a call of something compiled, also in what the compiler leaves to Python.
_frames: Any = torch._C._dynamo.eval_frame
_compiler_of_frames: Callable[[], Any] = _frames.get_eval_frame_callback


def autocast_dtype() -> torch.dtype | None:
    """Return the dtype of autocast where it is on, in compiled code too."""
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


# Where a module notes its hooks, by the numbers of their handles.
_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_numbers: set[int] = set()  # of the handles of all probes' hooks


class Handle:
    """A hook of a probe on a module, which copies and pickles of the module leave out.

    A table of hooks is an OrderedDict, which pickle and copy ask how to take it apart: one with
    hooks of a probe in it answers with all but these. So the file of a probed model names no class
    of this package.
    """

    def __init__(self, module: nn.Module, handle: Any) -> None:
        self._module, self._handle = module, handle
        _numbers.add(handle.id)
        for name in _TABLES:
            table = getattr(module, name)
            if handle.id in table:
                vars(table)["__reduce_ex__"] = partial(_without_probes, weakref.ref(table))

    def remove(self) -> None:
        self._handle.remove()
        _numbers.discard(self._handle.id)
        for name in _TABLES:
            table = getattr(self._module, name)
            if _numbers.isdisjoint(table):
                vars(table).pop("__reduce_ex__", None)


def _without_probes(table: Callable[[], Any], protocol: int) -> Any:
    items = [(number, hook) for number, hook in table().items() if number not in _numbers]
    return OrderedDict, (), None, None, iter(items)


class OfThisRun:
    """What belongs to one run in this process.

    A copy of something that holds it, a configuration or a model, holds the same one; in a pickle
    an empty OrderedDict stands in its place, for which the reader needs nothing of this package.
    """

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        return OrderedDict, ()


class Hook:
    """One hook of the probe; see :class:`Handle` for what copies of the model have of it."""

    def __init__(self, observer: Observer, number: int) -> None:
        self.observer = observer
        self.number = number
        self.taps: tuple[tuple[int, int], ...] = ()  # (which call, which state)
        self.several = False
        self.name = ""
        self.jobs: tuple[Job, ...] = ()
        # States of a module that is compiled on its own, seen where they are made: eagerly.
        self.stand_ins: tuple[int, ...] = ()

    def before(self, module: nn.Module) -> Handle:
        """Put the hook before a module's forward and before all other hooks there."""
        return Handle(
            module, module.register_forward_pre_hook(self, prepend=True, with_kwargs=True)
        )

    def behind(self, module: nn.Module, always: bool = False) -> Handle:
        """Put the hook behind a module's forward; ``always`` calls it after an error too."""
        return Handle(module, module.register_forward_hook(self, always_call=always))

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    def _see(self, state: Tensor) -> None:
        observer = self.observer
        current = observer.current
        if _backward_task() != -1:
            # A checkpointed block runs its forward again inside of the backward pass. What the
            # first forward saw is not counted twice; with use_reentrant=True it saw no gradient.
            current = observer.backward_of
            if current is not None and not self.several:
                current.see(self.taps[0][1], state)
            return
        if current is None or transformed():
            return
        if not self.several:
            current.see(self.taps[0][1], state)
            return
        call = current.calls.get(self.number, 0)
        current.calls[self.number] = call + 1
        for which, l in self.taps:
            if which == call:
                current.see(l, state)


class OutputHook(Hook):
    """A forward hook."""

    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        observer = self.observer
        if torch.compiler.is_compiling():
            if not self.jobs or not observer.observes():
                return None
            state = self._state_of(result)
            if state is None:
                return None
            passed = observer.through(self.jobs, state)
            return _replaced(result, state, passed)
        if self.stand_ins and observer.current is not None:
            for l in self.stand_ins:
                state = state_in(result)
                if l in (observer.in_compiled or ()) and state is not None:
                    observer.current.see(l, state)
        if self.taps and (observer.current or observer.backward_of):
            state = result if type(result) is Tensor else state_in(result)
            if state is not None:
                self._see(state)
        return None

    def _state_of(self, result: Any) -> Tensor | None:
        return state_in(result)


class LogitsHook(OutputHook):
    """The forward hook of what makes the logits: every call of it makes some of them.

    Attributes:
        is_inner: it is a module inside of the model, and what it returns are logits. What the model
            itself returns is looked at when its pass ends.
    """

    is_inner = False

    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().__call__(module, args, result)
        if transformed():
            return None
        observer = self.observer
        if self.is_inner and (observer.current or observer.backward_of):
            logits = self._state_of(result)
            again = _backward_task() != -1
            current = observer.backward_of if again else observer.current
            if current is not None and logits is not None:
                current.see_logits(logits, again)
        return None

    def _state_of(self, result: Any) -> Tensor | None:
        return state_in(result) if self.is_inner else output_of(result, self.observer.output)


class InputHook(Hook):
    """A forward pre-hook."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        observer = self.observer
        if torch.compiler.is_compiling():
            if not self.jobs or not observer.observes():
                return None
            state = argument_state(args, kwargs)
            if state is None:
                return None
            passed = observer.through(self.jobs, state)
            return _replaced(args, state, passed), _replaced(kwargs, state, passed)
        if self.taps and (observer.current or observer.backward_of):
            state = argument_state(args, kwargs)
            if state is not None:
                self._see(state)
        return None


class RootHook(Hook):
    """The forward pre-hook of the model: a pass begins."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            # Compiled for each state of autocast anew, and set with every call of what is compiled.
            self.observer.compiled_autocast = autocast_dtype()
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "StepProbe: expected one copy of the model in a process, got a replica of "
                "DataParallel, whose copies run at the same time; use DistributedDataParallel"
            )
        self.observer.begin(args, kwargs, autocast_dtype())


class EndHook(Hook):
    """The forward hook of the model: a pass has ended."""

    def __call__(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.compiler.is_compiling():
            return
        current = self.observer.end()
        # There is no result after an error.
        if current is not None and result is not None and not current.logit_shapes:
            logits = output_of(result, self.observer.output)
            if logits is not None:
                current.see_logits(logits)


class PrepareHook(Hook):
    """The forward pre-hook of what was given as the model, until the taps are known."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        observer = self.observer
        if exporting():
            return
        if not torch.compiler.is_compiling() and (transformed() or recorded()):
            observer.was_transformed = transformed()
            return
        if torch.compiler.is_compiling() or callable(_compiler_of_frames()):
            if observer.awaits_first_pass():
                _prepare_outside(observer, args, kwargs)
            return
        observer.installer.prepare_from_call(args, kwargs)
        if module is observer.model and observer.installer.prepared:
            # torch does not call hooks of this very call that came during it.
            observer.begin(args, kwargs, autocast_dtype())


def _prepare_outside(observer: Observer, args: Any, kwargs: Any) -> None:
    """Find the taps between two graphs; the compiler breaks the one it is at before this call.

    What comes behind, the model's own forward, is then compiled with the hooks in it.
    """
    observer.installer.prepare_from_call(args, kwargs)


# What torch.compiler.disable does, whose import takes seconds.
_frames.set_code_exec_strategy(
    _prepare_outside.__code__,
    _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.SKIP),
)
vars(_prepare_outside)["_torchdynamo_disable"] = True
vars(_prepare_outside)["_torchdynamo_disable_msg"] = (
    "StepProbe: expected the taps to be known before the model is compiled as one graph; give "
    "example=, or build the probe on what torch.compile returned"
)


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """Return a structure with one tensor replaced wherever it stands."""
    if value is old:
        return new
    if type(value) in (tuple, list):
        return type(value)([_replaced(item, old, new) for item in value])
    if type(value) is dict:
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, Mapping):  # the ModelOutput of transformers
        for key in list(value.keys()):
            if value[key] is old:
                value[key] = new  # type: ignore[index]
    return value
