"""Make a training's steps one after another: on a GPU by repeating a recorded one.

A small network's step is hundreds of kernels of a few microseconds, and Python takes longer to ask
for them than the GPU to run them. On CUDA a :class:`Stepper` therefore records one step as a CUDA
graph: batch, losses, gradients, optimiser, schedule. The graph finds its place by itself, in a
counter on the device, so that the host's part of a step is one call, which also lets go of the
interpreter's lock.

The steps before a recording are real steps, and recording executes nothing: no step is lost or
made twice, whether it succeeds or not. Not every rule can be recorded. What a rule does on the
host (:func:`host_state`) would happen once instead of in every step, and a step that waits for the
device cannot be recorded at all (:class:`HostReads`); both are looked for in a real step, and the
training goes on with ordinary steps where they are found.
"""

from __future__ import annotations

import pickle
import random
import re
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .._common.text import first_line
from .rules import Rule

# Real steps before a recording: libraries allocate their workspaces and choose their kernels, and
# the optimiser makes its state, which a recording must find there.
WARMUP = 3
# Steps whose batches and losses lie on the device at a time; 4 MiB of indices for batches of 128.
CHUNK = 4096


class Stepper:
    """Make the steps of one training.

    Args:
        rule: makes the updates.
        images: ``[N, ...]`` as the model takes them, on the device of the training.
        labels: ``[N]`` int64, there too.
        batches: yields the indices ``[B]`` int64 of one batch after another, on the CPU.
        batch_size: B.
        total: number of steps.
        record: whether steps may be recorded; on CUDA only, and on another stream than the
            device's default.
        losses: ``[done]``, of steps that were made before, for a training that goes on after them;
            ``batches`` then begins with the next one's.

    Attributes:
        done: steps made, those before included.
        graphed: those of them that a recording repeated.
        note: why steps cannot be recorded, "" where they can or need not be.
    """

    def __init__(
        self,
        rule: Rule,
        images: Tensor,
        labels: Tensor,
        batches: Iterator[Tensor],
        *,
        batch_size: int,
        total: int,
        record: bool,
        losses: Tensor | None = None,
    ) -> None:
        self.rule = rule
        self.images, self.labels = images, labels
        self.batches = batches
        self.total = total
        self.record = record and images.is_cuda
        self.graphed = 0
        self.note = ""
        device = images.device
        self._kept: list[Tensor] = [] if losses is None else [losses.to(device)]
        self.done = self._before = sum(map(len, self._kept))
        rows = min(total - self.done, CHUNK)
        self._order = torch.empty(rows, batch_size, dtype=torch.int64, device=device)
        self._place = torch.zeros(1, dtype=torch.int64, device=device)
        # Made by the first step, in the dtype of its loss.
        self._losses: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._phase: Any = None
        self._warm = 0
        self._replaying = threading.Lock()
        if self.record:
            with _registry:
                _replaying.add(self._replaying)

    def step(self) -> None:
        """Make the next step."""
        if (self.done - self._before) % len(self._order) == 0:
            self._next_chunk()
        if self.record:
            if self._warm and self.rule.phase != self._phase:
                self.close()
            if self._graph is None and self._warm == WARMUP:
                self._record()
        if not self.record:
            self._update()
        elif self._graph is not None:
            self._replay(self._graph)
        else:
            self._warm_up()
        self.done += 1

    def last_loss(self) -> float:
        """Return the loss of the last step; waits for it."""
        assert self._losses is not None
        return float(self._losses[(self.done - self._before - 1) % len(self._order)])

    def losses(self) -> Tensor:
        """Return the losses of all steps so far, ``[done]``, on the device."""
        return torch.cat([*self._kept, *self._losses_of_chunk()])

    def history(self) -> list[tuple[int, float]]:
        """Return (step, loss) of every step so far, counted from 1; waits for the last one."""
        # One transfer for the whole run rather than one wait per step.
        return list(enumerate(self.losses().tolist(), start=1))

    def close(self) -> None:
        """Drop the recording and its memory. Further steps start with ordinary ones."""
        graph, self._graph, self._warm = self._graph, None, 0
        if graph is not None:
            # What has been asked for still runs from the graph's memory.
            torch.cuda.current_stream(self.images.device).synchronize()
            with recording_alone():
                graph.reset()

    # One step.

    def _update(self) -> None:
        """Ask for one step; everything that differs between steps is read on the device."""
        chosen = self._order.index_select(0, self._place)[0]
        x, y = self.images.index_select(0, chosen), self.labels.index_select(0, chosen)
        loss = self.rule.update(x, y)["loss"].detach().to(self._place.device)
        if self._losses is None:
            self._losses = loss.new_zeros(len(self._order))
        self._losses.index_copy_(0, self._place, loss.reshape(1))
        self._place.add_(1)

    def _next_chunk(self) -> None:
        self._kept += self._losses_of_chunk()
        count = min(len(self._order), self.total - self.done)
        self._order[:count].copy_(torch.stack([next(self.batches) for _ in range(count)]))
        self._place.zero_()

    def _losses_of_chunk(self) -> list[Tensor]:
        missing = self.done - sum(len(losses) for losses in self._kept)
        return [] if self._losses is None else [self._losses[:missing].clone()]

    # Recording.

    def _warm_up(self) -> None:
        """Make a real step; the last one before a recording shows whether there can be one."""
        self._phase = self.rule.phase
        self._warm += 1
        if self._warm < WARMUP:
            self._update()
            return
        self.note = _reason_against(self.rule, self._update)
        self.record = not self.note

    def _record(self) -> None:
        """Record a step without making it, or find out that it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        generators = [g for g in host_state(self.rule).values() if isinstance(g, torch.Generator)]
        try:
            with recording_alone(), _counting_by(self.rule, lambda: None):
                _capture(graph, self._update, generators)
        except Exception as error:
            # What it leaves on the host; on the device nothing has happened.
            for parameter in self.rule.parameters:
                parameter.grad = None
            self.note = first_line(error, named=True)
            self.record = False
        else:
            self._graph = graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        with self._replaying:
            graph.replay()
        self.rule.count_step()
        self.graphed += 1


# What speaks against a recording


class HostReads(TorchDispatchMode):
    """Find the first call that makes the host wait for a device, or that moves data to or from it.

    Args:
        device_type: of the device.

    Attributes:
        found: what was called, "" while there was nothing.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.found:
            self.found = self._objection(func, (args, kwargs), result)
        return result

    def _objection(self, func: Any, given: Any, result: Any) -> str:
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        here = [tensor.device.type == self.device_type for tensor in (*tensors, *made)]
        if not any(here):
            return ""
        name = str(func).removesuffix(".default")
        if _INDEXED.match(name):
            # By numbers nothing waits; a mask has to be counted.
            waits = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
        else:
            waits = bool(_WAITING & set(func.tags))
        if waits:
            return f"{name} waits for the device"
        if _MOVING.match(name) and not all(here):
            return f"{name} moves a tensor between host and device"
        if name == "aten.lift_fresh":
            return "a tensor is made of Python values"
        return ""


_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXED = re.compile(r"aten\._?(unsafe_)?index(_put)?(_impl)?_?(\.|$)")
_MOVING = re.compile(r"aten\.(_to_copy|copy_?)(\.|$)")


def host_state(of: Any, device_type: str = "cuda") -> dict[str, Any]:
    """Return what an object holds on the host, by where it lies.

    Numbers, texts, generators and tensors, numpy's and Python's too, in attributes and containers
    at any depth. A step that changes any of it, or puts another tensor in a tensor's place, does
    something that a recording of it would not repeat. What tensors on a device of ``device_type``
    hold is not looked at.
    """
    found: dict[str, Any] = {}
    _collect(of, "rule", device_type, found, set())
    return found


def _collect(
    value: Any, path: str, device_type: str, found: dict[str, Any], seen: set[int]
) -> None:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        found[path] = value
    elif isinstance(value, Tensor):
        found[path] = value
        if value.device.type != device_type:
            found[f"{path} (written)"] = value._version
    elif isinstance(value, torch.Generator):
        found[path] = value
        if value.device.type == "cpu":
            found[f"{path} (state)"] = value.get_state().numpy().tobytes()
    elif isinstance(value, _PICKLED):
        found[path] = pickle.dumps(value)
    elif id(value) not in seen and not isinstance(value, _NO_STATE):
        seen.add(id(value))
        for where, item in _items(value, path):
            _collect(item, where, device_type, found, seen)


_PICKLED = (
    np.ndarray,
    np.generic,
    np.random.Generator,
    np.random.RandomState,
    random.Random,
)
_NO_STATE = (
    type,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.ModuleType,
)


def _items(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        # By place where a key is no text: an optimiser's keys are tensors.
        keys = [key if isinstance(key, str) else index for index, key in enumerate(value)]
        return [(f"{path}[{key!r}]", item) for key, item in zip(keys, value.values(), strict=True)]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    return [(f"{path}.{key}", item) for key, item in getattr(value, "__dict__", {}).items()]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | torch.Generator):
        return a is b
    # NaN is as it was, too.
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _reason_against(rule: Rule, step: Callable[[], None], device_type: str = "cuda") -> str:
    """Make a real step and return why such a step cannot be recorded, "" where it can."""
    states = [host_state(rule, device_type)]
    count = rule.count_step

    def counted() -> None:
        # What is counted may change: a repeated step is counted as well.
        states.append(host_state(rule, device_type))
        count()
        states.append(host_state(rule, device_type))

    reads = HostReads(device_type)
    with reads, _counting_by(rule, counted):
        step()
    states.append(host_state(rule, device_type))
    if reads.found:
        return reads.found
    for before, after in zip(states[::2], states[1::2], strict=True):
        for where in before | after:
            if where not in before or where not in after or not _same(before[where], after[where]):
                return f"{where} changes on the host in every step"
    return ""


@contextmanager
def _counting_by(rule: Rule, count: Callable[[], None]) -> Iterator[None]:
    rule.count_step = count  # type: ignore[method-assign]
    try:
        yield
    finally:
        del rule.count_step


# Recording among threads

# Before torch 2.12 every graph shares the default generator's state, and a replay beside a
# recording fails. So one thread records while none replays: every stepper has a lock of its own
# for its replays, which nobody else asks for until a recording takes them all.
_registry = threading.RLock()
_replaying: weakref.WeakSet[Any] = weakref.WeakSet()
# A graph whose recording broke off is asked by the allocator about its streams for ever.
_broken: list[torch.cuda.CUDAGraph] = []


@contextmanager
def recording_alone() -> Iterator[None]:
    """Keep other threads' recordings and replays of steps off; their other work goes on."""
    with _registry:
        locks = list(_replaying)
        taken = 0
        try:
            for lock in locks:
                lock.acquire()
                taken += 1
            yield
        finally:
            for lock in locks[:taken]:
                lock.release()


def _capture(
    graph: torch.cuda.CUDAGraph, step: Callable[[], None], generators: Sequence[torch.Generator]
) -> None:
    """Record a step on the current stream, without running it; leave torch whole if that fails."""
    # Without torch.cuda.graph, which waits for all streams and empties the allocator's cache.
    pool = torch.cuda.graph_pool_handle()
    for generator in generators:
        graph.register_generator_state(generator)
    # thread_local: what other threads do meanwhile, on streams of their own, is allowed.
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        step()
    except BaseException:
        try:
            graph.capture_end()
            graph.reset()
        except RuntimeError:
            _broken.append(graph)
            _repair(pool, generators)
        raise
    graph.capture_end()


def _repair(pool: Any, generators: Sequence[torch.Generator]) -> None:
    """Make torch forget a recording that CUDA broke off.

    The generators still count as being recorded, which the end of a whole recording puts right,
    and the allocator still gives to the broken one's pool.
    """
    device = torch.cuda.current_device()
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        with suppress(RuntimeError, AttributeError):
            getattr(torch._C, name)(device, pool)
    whole = torch.cuda.CUDAGraph()
    written = torch.zeros(1, device=f"cuda:{device}")
    with suppress(RuntimeError):
        for generator in generators:
            whole.register_generator_state(generator)
        whole.capture_begin(capture_error_mode="thread_local")
        written.zero_()
        whole.capture_end()
        whole.reset()


_streams = threading.local()


def stream_of_thread(device: torch.device) -> torch.cuda.Stream:
    """Return the calling thread's own stream of a CUDA device: always the same one.

    Libraries keep a workspace of megabytes for every stream they have seen.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    own: dict[int, torch.cuda.Stream] = _streams.__dict__.setdefault("own", {})
    if index not in own:
        own[index] = torch.cuda.Stream(index)
    return own[index]


@contextmanager
def recording_stream(device: torch.device) -> Iterator[None]:
    """Run on a stream that may record: on CUDA any but the device's default one."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        outer = torch.cuda.current_stream()
        if outer != torch.cuda.default_stream():
            yield
            return
        stream = stream_of_thread(device)
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            try:
                yield
            finally:
                outer.wait_stream(stream)
