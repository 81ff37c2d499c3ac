"""Capture hidden states and the gradients of the loss with respect to them.

(parameters, x, y) → hiddens, grads, and the gradient at the logits: one forward and one backward
pass, no gradient of a parameter, no copy of a state; row b of a gradient is sample b's. A first
forward pass without gradients (:mod:`fadiag_fast.tracing`) tells which torch call makes each tapped
state. There are two ways from there, and they give the same figures:

``torch.func``: the result of that call passes through a gradient slot, an identity whose backward
hands the gradient to a second, empty argument, and the loss is differentiated with respect to the
slots. That is a function of the parameters: it can be mapped over a stack of checkpoints
(``torch.vmap``) and traced into one graph. Its wrappers cost host time at every operation.

``autograd``: the states are seen by hooks and differentiated as they are. One model that runs
eagerly is captured so: it costs no more than the two passes (benchmarks/capture.py), and it also
serves what torch.func refuses: autograd functions of the old style, saved-tensor hooks, buffers
that the forward pass updates, sharded parameters.
"""

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .process import eager, forked_generators, own_warnings
from .taps import Select, Tap, TapError, Taps, find_taps, sighting_at, split_hidden
from .tracing import (
    Source,
    Trace,
    argument_state,
    as_plain,
    call_model,
    clean_name,
    signature,
    state_in,
    tensors_in,
    trace,
    watched,
    with_leaves,
)

Loss = Callable[[Any, Any], Tensor]
Output = str | int | Callable[[Any], Tensor]
Path = Literal["torch.func", "autograd"]


class Captured(NamedTuple):
    """One batch, seen from inside.

    Attributes:
        hiddens: one per tap, ``[B, ...]`` each.
        grads: the gradients of the loss at ``hiddens``, same shapes and dtypes. A loss with mean
            reduction puts the factor 1/B into them.
        logits: the network's output, or the tensor chosen from it; what goes into a softmax or the
            like where it ends in one. Of a network that has no output with a row for each sample,
            the last hidden state.
        logit_grads: the gradient of the loss at ``logits``.
        loss: scalar.
    """

    hiddens: list[Tensor]
    grads: list[Tensor]
    logits: Tensor
    logit_grads: Tensor
    loss: Tensor


_NO_GRADIENT = "autograd kernel was not registered"

# What nn.Module itself keeps in every module: parameters, submodules, hooks, the mode.
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; leave it and the random number generators as they were.

    Modes, buffers and the modules' own attributes (a counter, a kept attention map) are put back.
    What a forward pass writes into a list or dict that a module holds stays written.
    """
    modes = [(module, module.training) for module in model.modules()]
    # A forward pass may update buffers even in eval mode: a counter, for example.
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    kept = [
        (
            module,
            dict(module._buffers),
            own_attributes(module),
        )
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with forked_generators(devices):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, own_buffers, attributes in kept:
            module._buffers.update(own_buffers)
            for name in module.__dict__.keys() - attributes.keys() - _OF_EVERY_MODULE:
                del module.__dict__[name]
            module.__dict__.update(attributes)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes beyond those that every module has."""
    return {k: v for k, v in module.__dict__.items() if k not in _OF_EVERY_MODULE}


def constants_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers by name, detached: no gradient is taken at them."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return parameters | {name: buffer.detach() for name, buffer in model.named_buffers()}


def classification_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy over samples, or over tokens where there is a label for each.

    Args:
        logits: ``[B, C]``; ``[B, T, C]`` with labels ``[B, T]``; or ``[B, C, ...]`` with
            ``[B, ...]``.
        y: class indices (−100 is left out), or probabilities shaped like the logits.
    """
    if logits.dim() == 3 and y.shape == logits.shape[:-1]:
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    return nn.functional.cross_entropy(logits, y)


class _Slot(torch.autograd.Function):
    """Pass a state on; in the backward, give its gradient to ``slot`` as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, slot: Tensor, clone: bool, reached: set[int], index: int) -> Tensor:
        return h.clone() if clone else h.view_as(h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.reached, ctx.index = inputs[3], inputs[4]
        ctx.set_materialize_grads(False)  # no gradient is not a gradient of zero

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if grad is not None:
            ctx.reached.add(ctx.index)
        return grad, grad, None, None, None


@dataclass(frozen=True)
class _Spot:
    """A tensor of the forward pass that one or more taps see."""

    source: Source | None  # None: what the model returns
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    clone: bool  # something writes into it after the tap


@dataclass
class Plan:
    """How the taps are reached for inputs of one shape.

    Attributes:
        spots: the tensors to be differentiated.
        of_tap: per tap the index of its spot; None where its source is not known.
        overwritten: per tap whether something writes into the state after the tap.
        output: index of the logits' spot; of the last state's where there are none.
        has_output: whether there are.
        before_link: whether the logits' spot is in front of a softmax or the like.
        writes_input: whether the model writes into its input.
        unreachable: why ``torch.func`` cannot reach the taps; "" where it can.
    """

    spots: list[_Spot] = field(default_factory=list)
    of_tap: list[int | None] = field(default_factory=list)
    overwritten: list[bool] = field(default_factory=list)
    output: int = -1
    has_output: bool = True
    before_link: bool = False
    writes_input: bool = False
    unreachable: str = ""


class _Mismatch(RuntimeError):
    """Report a forward pass that went another way than the one that was traced."""


class _NotRequired(RuntimeError):
    """Report a hook of the user's on a tensor in front of where the graph begins."""


@contextmanager
def _hooks_explained(start: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if start == "parameters" or "n't require gradient" not in str(error):
            raise
        raise _NotRequired(str(error)) from error


class _Unreached(TapError):
    """Report states to which no gradient of the loss leads."""


class _Calls(TorchFunctionMode):
    """Count torch calls as the recorder did; change the results of those that a plan names."""

    def __init__(self, plan: Plan, change: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_calls = 0
        self.change = change
        self.by_call: dict[int, list[tuple[int, _Spot, int]]] = {}
        for index, spot in enumerate(plan.spots):
            if spot.source is not None and spot.source.kind == "call":
                place = (index, spot, spot.source.item)
                self.by_call.setdefault(spot.source.number, []).append(place)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not tensors_in(result):
            return result
        for index, spot, item in self.by_call.get(self.num_calls, ()):
            tensors = tensors_in(result)
            if item >= len(tensors) or tensors[item].shape != spot.shape:
                raise _Mismatch(f"call {self.num_calls} returned something else than when traced")
            result = _with_item(result, item, self.change(index, tensors[item]))
        self.num_calls += 1
        return result


def _with_item(result: Any, item: int, tensor: Tensor) -> Any:
    if isinstance(result, Tensor):
        return tensor
    places = [i for i, value in enumerate(result) if isinstance(value, Tensor)]
    values = list(result)
    values[places[item]] = tensor
    if isinstance(result, list):
        return values
    # A plain tuple and torch.return_types take a sequence, a NamedTuple takes its fields.
    return type(result)(*values) if hasattr(result, "_fields") else type(result)(values)


def _first_output(value: object) -> Tensor | None:
    """Return the first floating tensor that is no number, as a loss is; one at the top first."""
    if isinstance(value, Mapping):
        items = [item for key, item in value.items() if "loss" not in str(key).lower()]
    elif isinstance(value, tuple | list):
        items = list(value)
    else:
        items = list(vars(value).values()) if hasattr(value, "__dataclass_fields__") else []
    direct = (item for item in items if isinstance(item, Tensor) and item.dim())
    for item in direct:
        if item.is_floating_point() or item.is_complex():
            return item
    inner = (_first_output(item) for item in items if not isinstance(item, Tensor))
    return next((found for found in inner if found is not None), None)


def output_of(output: Any, choose: Output | None) -> Tensor | None:
    """Return the tensor of a model's output that counts as its logits; None where it has none.

    A tensor is taken itself; else ``logits``, ``out``, ``last_hidden_state`` or the first floating
    tensor. A number, such as a loss, is never taken. ``choose`` names an attribute, key or index
    instead, or computes the tensor.

    Raises:
        TapError: there is no tensor where ``choose`` says.
    """
    if choose is not None:
        return choose_output(output, choose)
    if isinstance(output, Tensor):
        return output if output.dim() else None
    for name in ("logits", "out", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor) and found.dim():
            return found
    return _first_output(output)


def _loss_in(output: Any) -> Any:
    """Return the loss that a model returns: ``loss``, the first number, or the sum of a dict's."""
    if isinstance(output, Tensor):
        return output if output.dim() == 0 else None
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    numbers = [
        value
        for value in (output.values() if isinstance(output, Mapping) else ())
        if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()
    ]
    if numbers and len(numbers) == len(output):  # the parts of a detector's loss
        return torch.stack(numbers).sum()
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0] if output[0].dim() == 0 else None
    return found


def choose_output(output: Any, choose: Output | None) -> Tensor:
    """Return the tensor that counts as logits as :func:`output_of` does.

    Raises:
        TapError: there is none.
    """
    found: Any = None
    if callable(choose):
        found = choose(output)
    elif choose is not None:
        try:
            found = (
                output[choose] if not hasattr(output, str(choose)) else getattr(output, str(choose))
            )
        except (KeyError, IndexError, TypeError):
            found = None
    else:
        found = output_of(output, None)
    if not isinstance(found, Tensor):
        keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        asked = f" at output={choose!r}" if choose is not None else " or something with logits"
        raise TapError(
            f"output: expected the model to return a tensor{asked}, got "
            f"{type(output).__name__}{keys}"
        )
    return found


# What a model may end in that the losses of the field otherwise do themselves: ∂loss/∂logits is
# taken in front of it. Its gradient behind is of another scale, and does not fall as a task is
# solved.
_LINKS = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "LogSigmoid"})
# What may stand between it and the output: the same numbers in another shape or type, and the
# logarithm of a softmax with what keeps it finite.
_BEHIND_LINKS = frozenset(
    {"View", "UnsafeView", "ReshapeAlias", "Alias", "ToCopy", "Clone", "Transpose", "T", "Permute"}
    | {"Squeeze", "Unsqueeze", "Expand", "Slice", "Select", "Log", "Clamp", "ClampMin", "Add"}
)
_MOST_BEHIND_LINKS = 8
_NODE = re.compile(r"(\w+?)Backward\d*$")


@functools.lru_cache
def _operator_of(node: str) -> str | None:
    """Return the operator whose gradient a node of autograd's computes, by the node's name."""
    found = _NODE.match(node)
    return None if found is None else found[1]


def before_link(output: Tensor) -> tuple[Any, int] | None:
    """Return the node of the graph that makes the logits of a model that ends in a softmax.

    Args:
        output: what the model returns, with its graph.

    Returns:
        The node and which of its outputs they are; None where the output itself is the logits.
    """
    node = output.grad_fn
    for _ in range(_MOST_BEHIND_LINKS):
        operator = None if node is None else _operator_of(node.name())
        if node is None or (operator not in _LINKS and operator not in _BEHIND_LINKS):
            return None
        inputs = [(one, index) for one, index in node.next_functions if one is not None]
        if operator in _LINKS:
            return inputs[0] if inputs else None
        if len(inputs) != 1:
            return None
        node = inputs[0][0]
    return None


def sample_rows(logits: Tensor, samples: int, batch_dim: int, name: str) -> Tensor:
    """Return logits or their gradients with a row for each sample.

    Args:
        logits: as the model returns them.
        samples: how many samples the states count along ``batch_dim``.
        batch_dim: the dimension of the states that counts samples.
        name: of the model, for the message.

    Raises:
        TapError: no dimension counts the samples.
    """
    shape = logits.shape
    # Logits [B, C] of states [T, B, D] are by sample already; [T, B, C] are not.
    fits = -len(shape) <= batch_dim < len(shape) and shape[batch_dim] == samples
    if fits and (len(shape) > 2 or shape[0] != samples):
        # Not moved where it stands first already: a compiler takes even that for a permutation, and
        # would read the gradient of the logits once more for their norm.
        return logits.movedim(batch_dim, 0) if batch_dim else logits
    if shape and shape[0] == samples:
        return logits
    if shape and samples and shape[0] % samples == 0 and batch_dim in (0, 1):
        positions = shape[0] // samples  # [B·T, C], or [T·B, C] of states [T, B, D]
        order = (positions, samples) if batch_dim else (samples, positions)
        return logits.reshape(*order, *shape[1:]).movedim(batch_dim, 0)
    raise TapError(
        f"{name}: output: expected logits with a row for each of {samples} samples, got shape "
        f"{list(shape)}; choose them by output=, or say batch_dim= if the states count samples "
        f"elsewhere than in dimension {batch_dim}"
    )


class Probe:
    """Capture batch after batch of one model.

    Args:
        model: an unwrapped module in eval mode (see :func:`untouched`).
        select: what to observe, see :func:`fadiag_fast.taps.find_taps`; None chooses.
        loss: (model output, y) → scalar; its reduction scales every gradient. None takes
            :func:`classification_loss`, or without labels the loss that the model returns.
        output: which part of a structured output counts as the logits, see :func:`choose_output`.
        batch_dim: the dimension of every state that counts samples.
        path: ``"torch.func"`` or ``"autograd"`` to force one; by default autograd for the model's
            own parameters and torch.func for given ones.
        several: whether more than one chain of blocks may be chosen.

    Attributes:
        taps: from the first batch on.
        path: the way taken, from the first batch on, and ``path_reason`` why not the other.
        reordered: whether a forward pass reached the taps in another order than the first one.
        has_output: whether the network has an output with a row for each sample.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        select: Select | None = None,
        loss: Loss | None = None,
        output: Output | None = None,
        batch_dim: int = 0,
        path: Path | None = None,
        several: bool = True,
    ) -> None:
        check_model(model)
        self.model = model
        self.select = select
        self.loss = loss
        self.output = output
        self.batch_dim = batch_dim
        self.path: Path | None = path
        self.path_reason = ""
        self.reordered = False
        self.several = several
        self.has_output = True
        self._order: list[int] = []
        if path is None and is_sharded(model):
            self.path = "autograd"
        self._captured_once = False
        self._taps: Taps | None = None
        self._plans: dict[tuple[Any, ...], Plan] = {}
        modules = {clean_name(name): module for name, module in model.named_modules()}
        self._modules: Mapping[str, nn.Module] = modules

    @property
    def taps(self) -> Taps:
        if self._taps is None:
            raise RuntimeError("Probe.taps: expected prepare or capture to be called first")
        return self._taps

    # ---- planning

    def prepare(self, x: Any) -> Plan:
        """Find the taps, and how they are reached for inputs shaped like ``x``.

        Raises:
            TapError: see :func:`fadiag_fast.taps.find_taps`; and where a state does not count
                samples along ``batch_dim``, lies on another device than the first one, or is
                sparse.
        """
        x = as_plain(x)
        key = signature(x)
        if key in self._plans:
            return self._plans[key]
        with torch.inference_mode(False):
            x = tree_map_only(Tensor, torch.clone, x)  # some models write into their input
        if self._taps is None:
            self._taps, seen = find_taps(
                self.model,
                x,
                self.select,
                lambda state: self.counts_samples(x, state),
                batch_dim=self.batch_dim,
                several=self.several,
            )
        else:
            options = {"return_hidden": True} if self.taps.hands_out else {}
            seen = trace(self.model, x, **options)
        self._plans[key] = self._plan(x, seen)
        return self._plans[key]

    def _plan(self, x: Any, seen: Trace) -> Plan:
        plan = Plan(writes_input=seen.recorder.wrote_input)
        name = type(self.model).__name__
        spots: dict[Source, int] = {}
        devices: dict[str, str] = {}
        sightings: list[Tensor] = []

        for tap in self.taps.points:
            sighting = sighting_at(seen, tap)
            if sighting is None:
                raise TapError(
                    f"{name}: {tap.where}: expected a call as in the first batch, got none: the "
                    f"forward pass depends on its input"
                )
            self._check_state(x, tap, sighting.tensor)
            sightings.append(sighting.tensor)
            devices.setdefault(str(sighting.tensor.device), tap.where)
            plan.overwritten.append(sighting.overwritten)
            if sighting.source is None:
                plan.of_tap.append(None)
                plan.unreachable = f"{tap.where} is not what a torch call returned"
                continue
            if sighting.source not in spots:
                spots[sighting.source] = len(plan.spots)
                state, clone = sighting.tensor, sighting.overwritten
                plan.spots.append(
                    _Spot(sighting.source, state.shape, state.dtype, state.device, clone)
                )
            plan.of_tap.append(spots[sighting.source])
        if len(devices) > 1:
            places = ", ".join(f"{where} on {device}" for device, where in devices.items())
            raise TapError(f"{name}: expected all states on one device, got {places}")
        logits = self._output_of(seen.output)
        plan.has_output = self._has_rows(logits, sightings)
        if logits is None or not plan.has_output:
            plan.output = -1 if not plan.of_tap or plan.of_tap[-1] is None else plan.of_tap[-1]
            self.has_output = False
            return plan
        made = seen.recorder.before_link(logits)
        source = None
        if made is not logits and seen.recorder.source_of(made) is not None:
            plan.before_link, logits = True, made
            source = seen.recorder.source_of(made)
        elif not (isinstance(seen.output, Tensor) or self.taps.hands_out):
            # The loss reads the structure, so that the tensor inside has to be the slotted one.
            source = seen.recorder.source_of(logits)
            if source is None:
                plan.unreachable = "the output is not what a torch call returned"
        if source in spots:
            plan.output = spots[source]
        else:
            plan.output = len(plan.spots)
            plan.spots.append(_Spot(source, logits.shape, logits.dtype, logits.device, False))
        return plan

    def _output_of(self, output: Any) -> Tensor | None:
        if self.taps.hands_out and not isinstance(output, Tensor):
            return split_hidden(output, type(self.model).__name__)[0]
        return output_of(output, self.output)

    def _has_rows(self, logits: Tensor | None, states: Sequence[Tensor]) -> bool:
        """Return whether a network's output can be told apart by the samples of its states."""
        if logits is None or not states:
            return logits is not None
        try:
            samples = states[0].shape[self.batch_dim]
            sample_rows(logits, samples, self.batch_dim, type(self.model).__name__)
        except TapError:
            # What is asked for by name must fit.
            if self.output is not None:
                raise
            return False
        return True

    def _sample_counts(self, x: Any) -> set[int]:
        """Return how many samples an input may hold: the lengths of its tensors' dimensions.

        The first dimension, and the one that counts samples in the states.
        """
        tensors = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim()]
        sizes = {leaf.shape[0] for leaf in tensors}
        return sizes | {
            leaf.shape[self.batch_dim]
            for leaf in tensors
            if -leaf.dim() <= self.batch_dim < leaf.dim()
        }

    def counts_samples(self, x: Any, state: Tensor) -> bool:
        """Say whether a state's batch dimension is as long as one of the input's."""
        counts = self._sample_counts(x)
        fits = -state.dim() <= self.batch_dim < state.dim()
        return not counts or (fits and state.shape[self.batch_dim] in counts)

    def _check_state(self, x: Any, tap: Tap, state: Tensor) -> None:
        name = type(self.model).__name__
        if state.layout is not torch.strided:
            raise TapError(f"{name}: {tap.where}: expected a dense state, got {state.layout}")
        if self.counts_samples(x, state):
            return
        counts = self._sample_counts(x)
        others = [i for i, size in enumerate(state.shape) if size in counts]
        hint = f"; batch_dim={others[0]} would fit" if others else ""
        raise TapError(
            f"{name}: {tap.where}: expected a state with {' or '.join(map(str, sorted(counts)))} "
            f"samples along dimension {self.batch_dim}, got shape {list(state.shape)}{hint}"
        )

    # ---- capturing

    def capture(self, x: Any, y: Any, *, constants: Mapping[str, Tensor] | None = None) -> Captured:
        """Run one forward and one backward pass and return what :class:`Captured` lists.

        Args:
            x: input batch: a tensor, a tuple of arguments, or a dict of keywords.
            y: targets, passed to the loss.
            constants: parameters and buffers by name; None takes the model's own.

        Raises:
            TapError: a state cannot be observed, or the loss does not depend on it.
            ValueError: the loss is not a scalar.
        """
        x = as_plain(x)
        if self._captured_once:  # looking at warnings makes torch repeat the others
            return self._capture(x, y, constants)
        with self._gradients_required():
            captured = self._capture(x, y, constants)
        self._captured_once = True
        return captured

    def logits_with(self, x: Any, l: int | None, offset: Tensor | None) -> Tensor:
        """Return the logits, a row for each sample, of a forward pass with one state moved.

        Args:
            x: input batch, as for :meth:`capture`.
            l: index of the tap whose state is moved; every later use of it sees the moved state,
                a skip around the next block included. None moves nothing.
            offset: what is added to the state, ``[B, ...]`` with the samples first.

        Raises:
            TapError: the state is not what a torch call returned, and cannot be replaced.
        """
        x = as_plain(x)
        plan = self.prepare(x)
        index = None if l is None else plan.of_tap[l]
        if l is not None and index is None:
            raise TapError(
                f"{type(self.model).__name__}: {self.taps.points[l].where}: expected a state that "
                f"a torch call returned, got one that cannot be replaced in the forward pass"
            )
        moved = False

        def move(spot: int, tensor: Tensor) -> Tensor:
            nonlocal moved
            if spot != index or offset is None:
                return tensor
            moved = True
            by = offset if self.batch_dim == 0 else offset.movedim(0, self.batch_dim)
            return tensor + by

        with torch.inference_mode(False), torch.no_grad(), eager():
            leaves = list(tree_leaves(x))
            if plan.writes_input:
                leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for spot, place in enumerate(plan.spots):
                if place.source is not None and place.source.kind == "input":
                    leaves[place.source.number] = move(spot, leaves[place.source.number])
            with _Calls(plan, move):
                output = self._forward(with_leaves(x, leaves), None)
        if l is not None and not moved:
            raise self._changed(self.taps.points[l])
        logits = self.logits_of(output)
        samples = logits.shape[0] if offset is None else offset.shape[0]
        return sample_rows(logits, samples, self.batch_dim, type(self.model).__name__)

    @contextmanager
    def _gradients_required(self) -> Iterator[None]:
        """Refuse operators without a gradient, of which torch only warns and passes nothing on."""
        with own_warnings():
            warnings.filterwarnings("error", message=f".*{_NO_GRADIENT}")
            try:
                yield
            except UserWarning as warning:
                operator, found, _ = str(warning).partition(f": an {_NO_GRADIENT}")
                if not found:
                    raise
                raise TapError(
                    f"{type(self.model).__name__}: expected operators that have a gradient, got "
                    f"{operator}, through which none passes; probe the model before it is "
                    f"quantised, or name taps behind it"
                ) from None

    def _capture(self, x: Any, y: Any, constants: Mapping[str, Tensor] | None) -> Captured:
        plan = self.prepare(x)
        if constants is not None and self.path is None:
            self.path = "torch.func"
        if self.path == "autograd":
            return self._by_autograd(plan, x, y, constants)
        if self.path == "torch.func":
            return self._by_func_again(plan, x, y, constants)
        try:
            captured = self._by_autograd(plan, x, y, constants)
            self.path = "autograd"
            return captured
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if plan.unreachable:
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        captured = self._by_func_again(plan, x, y, constants)
        self.path, self.path_reason = "torch.func", f"autograd: {reason}"
        return captured

    def _by_func_again(
        self, plan: Plan, x: Any, y: Any, constants: Mapping[str, Tensor] | None
    ) -> Captured:
        """Capture by torch.func; where the pass went another way, trace it once more."""
        try:
            return self._by_func(plan, x, y, constants)
        except _Mismatch:
            if plan.unreachable:
                raise
            # A model may keep something from its first pass: relative positions, for example.
            del self._plans[signature(x)]
            plan = self.prepare(x)
        try:
            return self._by_func(plan, x, y, constants)
        except _Mismatch as mismatch:
            raise TapError(
                f"{type(self.model).__name__}: expected a forward pass that goes the same way when "
                f"it is run again, got one in which {mismatch}"
            ) from None

    def _note_order(self, met: list[int]) -> None:
        self._order = self._order or list(met)
        self.reordered |= met != self._order

    def _loss_of(self, output: Any, logits: Tensor | None, y: Any) -> Tensor:
        found: Any
        if self.loss is not None:
            found = self.loss(output, y)
        elif y is not None and logits is not None:
            found = classification_loss(logits, y)
        else:
            found = _loss_in(output)
            if found is None:
                raise TapError(
                    f"{type(self.model).__name__}: expected labels, a loss function, or a model "
                    f"that returns its loss, got {type(output).__name__} without one"
                )
        if not isinstance(found, Tensor):
            raise ValueError(f"loss: expected a scalar tensor, got {type(found).__name__}")
        if found.dim() != 0:
            raise ValueError(f"loss: expected a scalar, got shape {list(found.shape)}")
        return found

    def _forward(self, x: Any, constants: Mapping[str, Tensor] | None) -> Any:
        options = {"return_hidden": True} if self.taps.hands_out else {}
        if constants is None:
            return call_model(self.model, x, **options)
        args = () if isinstance(x, Mapping) else tuple(x) if isinstance(x, tuple | list) else (x,)
        kwargs = {**x, **options} if isinstance(x, Mapping) else options
        return torch.func.functional_call(self.model, dict(constants), args, kwargs, strict=False)

    def _watch(self, see: Callable[[int, Tensor | None], None]) -> Any:
        """Return a context in which ``see(l, tensor)`` is called at every tap's call."""
        counts: dict[str, int] = {}
        running: dict[str, list[int]] = {}  # a module may call itself
        wanted: dict[tuple[str, str, int], list[int]] = {}
        for l, tap in enumerate(self.taps.points):
            wanted.setdefault((tap.module, tap.at, tap.call), []).append(l)

        def entered(name: str, args: Any, kwargs: Any) -> None:
            counts[name] = counts.get(name, -1) + 1
            running.setdefault(name, []).append(counts[name])
            for l in wanted.get((name, "input", counts[name]), ()):
                see(l, argument_state(args, kwargs))

        def left(name: str, result: Any) -> None:
            for l in wanted.get((name, "output", running[name].pop()), ()):
                see(l, state_in(result))

        if self.taps.hands_out:
            return watched({}, entered, left)
        names = {tap.module for tap in self.taps.points}
        return watched({name: self._modules[name] for name in names}, entered, left)

    def _by_func(
        self, plan: Plan, x: Any, y: Any, constants: Mapping[str, Tensor] | None
    ) -> Captured:
        if plan.unreachable:
            raise _Mismatch(plan.unreachable)
        reached: set[int] = set()
        num_taps = len(self.taps.points)
        of_tap = [index for index in plan.of_tap if index is not None]

        def run(slots: Sequence[Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
            values: dict[int, Tensor] = {}
            passed: dict[int, Tensor] = {}
            met: list[int] = []

            def slot(index: int, tensor: Tensor) -> Tensor:
                values[index] = tensor
                clone = plan.spots[index].clone
                passed[index] = _Slot.apply(  # type: ignore[no-untyped-call]
                    tensor, slots[index], clone, reached, index
                )
                return passed[index]

            def see(l: int, tensor: Tensor | None) -> None:
                index = plan.of_tap[l]
                if index is None or tensor is None or passed.get(index) is not tensor:
                    raise _Mismatch(f"{self.taps.points[l].where} is not the tensor traced")
                met.append(l)

            leaves = list(tree_leaves(x))
            if plan.writes_input:
                leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for index, spot in enumerate(plan.spots):
                if spot.source is not None and spot.source.kind == "input":
                    leaves[spot.source.number] = slot(index, leaves[spot.source.number])
            with self._watch(see), _Calls(plan, slot):
                output = self._forward(with_leaves(x, leaves), constants)
            if self.taps.hands_out:
                for l, state in enumerate(split_hidden(output, "the model")[1][:num_taps]):
                    see(l, state)
            if len(met) < num_taps:
                missing = next(l for l in range(num_taps) if l not in met)
                raise _Mismatch(f"{self.taps.points[missing].where} was not reached")
            self._note_order(met)
            logits = self._output_of(output)
            if plan.output < 0:
                raise _Mismatch("there is no output with a row for each sample")
            if plan.has_output and not plan.before_link:
                if logits is None:
                    raise _Mismatch("there is no output")
                if plan.spots[plan.output].source is None:
                    logits = slot(plan.output, logits)
                elif passed.get(plan.output) is not logits:
                    raise _Mismatch("the output is not the tensor that was traced")
            elif plan.output not in passed:
                raise _Mismatch("the output is not what was traced")
            loss = self._loss_of(self._for_loss(output, logits), logits, y)
            hiddens = [values[index] for index in of_tap]
            return loss, (hiddens, values[plan.output])

        slots = [
            torch.zeros((), dtype=s.dtype, device=s.device).expand(s.shape) for s in plan.spots
        ]
        # The outer no_grad keeps the parameters out of any graph; grad has its own.
        with torch.inference_mode(False), torch.no_grad(), eager():
            grads, (loss, (hiddens, logits)) = torch.func.grad_and_value(run, has_aux=True)(slots)
        self._check_reached([index in reached for index in of_tap])
        return self._captured(
            hiddens, [grads[index] for index in of_tap], logits, grads[plan.output], loss
        )

    def _by_autograd(
        self, plan: Plan, x: Any, y: Any, constants: Mapping[str, Tensor] | None
    ) -> Captured:
        """Capture by ordinary autograd.

        The graph begins at the states, which are made to require gradients where torch makes them.
        Where that is not known it begins at the input, or at the parameters if no floating input
        leads to the first state. Their gradients are still never asked for, but what a backward
        pass through them would need is kept for nothing, and may not be overwritten.
        """
        if None not in plan.of_tap and not is_sharded(self.model):
            try:
                return self._autograd_pass(plan, x, y, constants, "states")
            except _Mismatch:
                # A model may keep something from its first pass: relative positions, for example.
                del self._plans[signature(x)]
                plan = self.prepare(x)
            except _NotRequired:
                pass
        try:
            return self._autograd_pass(plan, x, y, constants, "input")
        except (_Unreached, _NotRequired):
            return self._autograd_pass(plan, x, y, constants, "parameters")

    def _autograd_pass(
        self,
        plan: Plan,
        x: Any,
        y: Any,
        constants: Mapping[str, Tensor] | None,
        start: Literal["states", "input", "parameters"],
    ) -> Captured:
        num_taps = len(self.taps.points)
        hiddens: list[Tensor | None] = [None] * num_taps
        # A tensor's gradient edge stays that of the moment, whatever is written into it later.
        edges: list[GradientEdge | None] = [None] * num_taps
        met: list[int] = []
        passed: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}

        def change(index: int, tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            values[index] = tensor
            passed[index] = tensor.clone() if plan.spots[index].clone else tensor
            return passed[index]

        def see(l: int, tensor: Tensor | None) -> None:
            if tensor is None:
                return
            met.append(l)
            if start == "states":
                index = plan.of_tap[l]
                if index not in passed or passed[index] is not tensor:
                    raise _Mismatch(f"{self.taps.points[l].where} is not the tensor traced")
                hiddens[l] = values[index]  # no torch calls here: they are being counted
                return
            edges[l] = get_gradient_edge(tensor) if tensor.requires_grad else None
            hiddens[l] = tensor.detach().clone() if plan.overwritten[l] else tensor

        def differentiable(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            floating = tensor.is_floating_point() or tensor.is_complex()
            return tensor.requires_grad_() if floating else tensor

        def run() -> Captured:
            inputs = x if start == "states" else tree_map_only(Tensor, differentiable, x)
            if plan.writes_input:
                inputs = tree_map_only(Tensor, torch.clone, inputs)
            counted: AbstractContextManager[object] = nullcontext()
            if start == "states":
                leaves = list(tree_leaves(inputs))
                for index, spot in enumerate(plan.spots):
                    if spot.source is not None and spot.source.kind == "input":
                        leaves[spot.source.number] = change(index, leaves[spot.source.number])
                inputs, counted = with_leaves(inputs, leaves), _Calls(plan, change)
            with self._watch(see), counted:
                output = self._forward(inputs, None)
            logits = self._output_of(output)
            if self.taps.hands_out:
                for l, state in enumerate(split_hidden(output, "the model")[1][:num_taps]):
                    see(l, state)
            for l, tap in enumerate(self.taps.points):
                seen = hiddens[l]
                if seen is None:
                    raise self._changed(tap)
                if start == "states":
                    edges[l] = get_gradient_edge(seen)
            self._note_order(met)
            loss = self._loss_of(self._for_loss(output, logits), logits, y)
            if logits is not None and plan.has_output:
                edge = get_gradient_edge(logits) if logits.requires_grad else None
                made = before_link(logits) if edge is not None else None
                if plan.before_link and plan.output in values:
                    logits = values[plan.output]
                    edge = get_gradient_edge(logits) if logits.requires_grad else None
                elif made is not None:
                    edge = GradientEdge(*made)
            else:
                logits, edge = hiddens[-1], edges[-1]
            assert logits is not None  # a tap has been seen
            targets = [*edges, edge]
            at = {i: target for i, target in enumerate(targets) if target is not None}
            found: Sequence[Tensor | None] = ()
            if at and loss.requires_grad:
                found = self._gradients(loss, list(at.values()))
            grads = dict(zip(at, found, strict=False))
            self._check_reached([grads.get(l) is not None for l in range(num_taps)])
            logit_grads = grads.get(num_taps)
            return self._captured(
                [h.detach() for h in hiddens if h is not None],
                [grad for l in range(num_taps) if (grad := grads[l]) is not None],
                logits.detach(),
                torch.zeros_like(logits) if logit_grads is None else logit_grads,
                loss.detach(),
            )

        with torch.inference_mode(False), torch.enable_grad(), eager(), _hooks_explained(start):
            if constants is None and is_sharded(self.model):
                return run()
            constants = constants_of(self.model) if constants is None else constants
            if start == "parameters":
                buffers = {name for name, _ in self.model.named_buffers()}
                constants = {
                    name: t if name in buffers else differentiable(t)
                    for name, t in constants.items()
                }
            # The backward pass is inside: a checkpointed block runs its forward again in it.
            held = {f"model.{name}": tensor for name, tensor in constants.items()}
            captured: Captured = torch.func.functional_call(
                _Held(self.model), held, (run,), strict=False
            )
            return captured

    def _gradients(self, loss: Tensor, at: Sequence[GradientEdge]) -> Sequence[Tensor | None]:
        try:
            return torch.autograd.grad(loss, at, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise TapError(
                f"{type(self.model).__name__}: expected torch.utils.checkpoint with "
                f"use_reentrant=False, or none in eval mode, got use_reentrant=True, which can be "
                f"differentiated by parameters only"
            ) from None

    def logits_of(self, output: Any) -> Tensor:
        """Return the part of the model's output that counts as its logits.

        Raises:
            TapError: there is none.
        """
        found = self._output_of(output)
        return choose_output(output, self.output) if found is None else found

    def _for_loss(self, output: Any, logits: Tensor | None) -> Any:
        """Return what a loss function is given: a structured output as it is, else the logits."""
        whole = self.taps.hands_out or isinstance(output, Tensor)
        return logits if whole and logits is not None else output

    def _changed(self, tap: Tap) -> TapError:
        return TapError(
            f"{type(self.model).__name__}: {tap.where}: expected a call as in the first batch, got "
            f"none: the forward pass depends on its input"
        )

    def _check_reached(self, reached: Sequence[bool]) -> None:
        lost = [tap.where for tap, yes in zip(self.taps.points, reached, strict=True) if not yes]
        parameters = list(self.model.parameters())
        frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if lost and frozen and is_sharded(self.model):
            raise _Unreached(
                f"{type(self.model).__name__}: {', '.join(lost)}: expected a state that autograd "
                f"can reach, got one behind sharded parameters that are all frozen; unfreeze one "
                f"before the first tap"
            )
        if lost:
            raise _Unreached(
                f"{type(self.model).__name__}: {', '.join(lost)}: expected a state that the loss "
                f"depends on, got one that is detached, unused or overwritten; name taps "
                f"without it"
            )

    def _captured(
        self,
        hiddens: Sequence[Tensor],
        grads: Sequence[Tensor],
        logits: Tensor,
        logit_grads: Tensor,
        loss: Tensor,
    ) -> Captured:
        def by_sample(tensor: Tensor) -> Tensor:
            return tensor if self.batch_dim == 0 else tensor.movedim(self.batch_dim, 0)

        if hiddens and self.has_output:
            samples = by_sample(hiddens[0]).shape[0]
            name = type(self.model).__name__
            logits, logit_grads = (
                sample_rows(t, samples, self.batch_dim, name) for t in (logits, logit_grads)
            )
        elif hiddens:
            logits, logit_grads = by_sample(logits), by_sample(logit_grads)
        return Captured(
            [by_sample(h) for h in hiddens],
            [by_sample(g) for g in grads],
            logits,
            logit_grads,
            loss,
        )


class _Held(nn.Module):
    """A model in which something is done while its parameters are replaced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, do: Callable[[], Any]) -> Any:
        return do()


def check_model(model: nn.Module) -> None:
    """Raise TapError for a model that no path can differentiate."""
    name = type(model).__name__
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TapError(
                f"{name}: {path or 'the model'}: expected torch's fully_shard, got its predecessor "
                f"FullyShardedDataParallel, which gives parameters to its own forward only; probe "
                f"the module before it is wrapped"
            )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise TapError(
                f"{name}: {path}: expected a tensor with values, got a lazy module's before its "
                f"first call; call the model once"
            )
        if tensor.is_inference():
            raise TapError(
                f"{name}: {path}: expected an ordinary tensor, got one made under "
                f"torch.inference_mode, which autograd cannot use; build the model outside of it"
            )
        if tensor.is_meta:
            raise TapError(
                f"{name}: {path}: expected a tensor with values, got one on the meta device; load "
                f"the weights first"
            )


def is_sharded(model: nn.Module) -> bool:
    """Say whether parameters are spread over processes: only the model itself can gather them."""
    # Nothing can be a DTensor where its module, which takes a while to import, is not.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and any(
        isinstance(parameter, distributed.DTensor) for parameter in model.parameters()
    )
